"""convert.sbatch, pipeline.sh, tensorboard.sbatch, run.sbatch and containers on a real Slurm."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from d2v_ds.data.shard_format import open_set
from shards import samples
from shards.cli import main as shards_main
from tests.slurm.cluster import HERE, SCRIPTS, Cluster, Job, Workplace
from tests.slurm.conftest import standin_settings

SOURCE = samples.path("speech") / "unseen.tsv"
SMALL = ("--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1")


def place(cluster: Cluster, folder: Path, more: str = "") -> Workplace:
    real = f"export PYTHON={sys.executable} PYTHONPATH={HERE.parent.parent}\n"
    return Workplace(cluster, folder, standin_settings() + real + more)


def pipeline(where: Workplace, *words: str) -> subprocess.CompletedProcess[str]:
    return where.cluster.command(
        str(SCRIPTS / "pipeline.sh"),
        *words,
        cwd=where.folder,
        environment={"D2V_CLUSTER_ENV": str(where.settings)},
    )


def jobs(where: Workplace, output: str) -> list[Job]:
    """The jobs that pipeline.sh reports."""
    numbers = re.findall(r"^(\d+): ", output, re.MULTILINE)
    return [Job(where.cluster, number, where.folder) for number in numbers]


@pytest.mark.slow  # test_slurm_finetune has a longer pipeline
def test_a_pipeline_from_corpus_to_evaluation(cluster: Cluster, tmp_path: Path) -> None:
    """An array with a task that fails once, its merge, training on two nodes, a final command."""
    where = place(cluster, tmp_path / "home")
    convert = ["--array=0-2", "--cpus-per-task=1", "convert", "speech", str(SOURCE), "set"]
    words = [*convert, "--shard-size=100KB"]
    words += ["then", "--nodes=2", *SMALL, "pretrain", "run.dir=run", "run.steps=5"]
    words += ["then", "--cpus-per-task=1", "cat", "run/DONE"]
    submitted = pipeline(where, *words)
    assert submitted.returncode == 0, submitted.stderr
    array, merge, training, last = jobs(where, submitted.stdout)
    assert last.field("Dependency").startswith(f"afterok:{training.number}")
    last.ends(seconds=90)
    assert last.log() == "{}"
    assert "set: 100 samples" in merge.log()
    texts = [path.read_text() for path in where.folder.glob("d2v-convert-*.out")]
    assert sum("requeue: failed with exit code 1" in text for text in texts) == 1
    assert sum("task 1 of 3 has finished" in text for text in texts) == 1
    assert array.field("JobState") == "COMPLETED"
    assert shards_main(["speech", str(SOURCE), str(tmp_path / "whole"), "--shard-size=100KB"]) == 0
    assert open_set(where.folder / "set").shards == open_set(tmp_path / "whole").shards


def test_a_failing_stage_cancels_the_later_ones(cluster: Cluster, tmp_path: Path) -> None:
    where = place(cluster, tmp_path / "home")
    submitted = pipeline(where, "false", "then", "echo", "never")
    first, second = jobs(where, submitted.stdout)
    first.ends("FAILED")
    second.ends("CANCELLED")


def test_a_dry_run_submits_nothing(cluster: Cluster, tmp_path: Path) -> None:
    where = place(cluster, tmp_path / "home", "export SBATCH_PARTITION=nowhere\n")
    words = ["--array=0-7", "convert", "speech", "/my corpus", "/s", "then", "pretrain", "a=b"]
    shown = pipeline(where, "--dry-run", *words)
    assert shown.stdout.splitlines() == [
        f"sbatch --parsable --kill-on-invalid-dep=yes {line}"
        for line in (
            f"--array=0-7 {SCRIPTS}/convert.sbatch speech /my\\ corpus /s ",
            f"--dependency=afterok:JOB1 {SCRIPTS}/convert.sbatch merge /s ",
            f"--dependency=afterok:JOB2 {SCRIPTS}/pretrain.sbatch a=b ",
        )
    ]
    refused = pipeline(where, *words)  # the settings of the cluster reach sbatch
    assert refused.returncode == 1 and "invalid partition" in refused.stderr
    assert "sbatch refused a stage" in refused.stderr


def test_wrong_arguments_of_a_pipeline(cluster: Cluster, tmp_path: Path) -> None:
    where = place(cluster, tmp_path / "home")
    for words, message in (
        (["--nodes=2"], "a stage needs a name"),
        (["pretrain", "a=b", "then"], "a stage needs a name"),
        (["--dry-run", "--array=0-3", "convert", "speech", "--x"], "before the options"),
    ):
        done = pipeline(where, *["--dry-run"] * (words[0] != "--dry-run"), *words)
        assert done.returncode == 2 and message in done.stderr


def test_an_array_with_gaps_is_refused(cluster: Cluster, tmp_path: Path) -> None:
    where = place(cluster, tmp_path / "home")
    options = ("--array=0,2", "--cpus-per-task=1")
    job = where.submit("convert.sbatch", "speech", SOURCE, "set", options=options)
    job.ends("FAILED")
    assert "the task numbers must have no gaps" in job.log() and job.code == 2


def test_tensorboard_prints_its_address_and_answers(cluster: Cluster, tmp_path: Path) -> None:
    where = place(cluster, tmp_path / "home")
    (where.folder / "runs").mkdir()
    job = where.submit("tensorboard.sbatch", "runs", options=("--cpus-per-task=1",))
    job.says(r"ssh -N -L 6006:localhost:\d+ -J \w+@\S+ \w+@vn\d\n")
    job.says("Press CTRL", 90)
    found = re.search(r"6006:localhost:(\d+) .*@(vn\d)", job.log())
    assert found
    port, node = found[1], found[2]

    def answer(host: str) -> str:
        url = f"http://{host}:{port}/data/logdir"
        if not cluster.namespaces:
            return urllib.request.urlopen(url, timeout=20).read().decode()
        code = f"import urllib.request as r; print(r.urlopen('{url}', timeout=20).read().decode())"
        return cluster("exec", node, sys.executable, "-c", code)

    assert json.loads(answer("localhost"))["logdir"] == "runs"
    if cluster.namespaces:  # it must not listen on the address of the node
        with pytest.raises(AssertionError, match="Connection refused"):
            answer(node)
    cluster.command("scancel", job.number)
    wrong = where.submit("tensorboard.sbatch", "nowhere").ends("FAILED")
    assert "nowhere: no such folder" in wrong.log()


def test_every_command_runs_in_the_container(cluster: Cluster, tmp_path: Path) -> None:
    """The container is a shim that records its arguments and runs the command."""
    shim = tmp_path / "bin/apptainer"
    shim.parent.mkdir()
    shim.write_text(f'#!/bin/bash\necho "$@" >>{tmp_path}/calls\nshift 3\nexec "$@"\n')
    shim.chmod(0o755)
    more = f"export PATH={shim.parent}:$PATH\nLAUNCH=(apptainer exec --nv image.sif)\n"
    where = place(cluster, tmp_path / "home", more)
    options = ("--nodes=2", *SMALL)
    where.submit("pretrain.sbatch", "run.dir=run", "run.steps=3", options=options).ends()
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls[0] == "exec --nv image.sif d2v-ds train --check --nproc 2 run.dir=run run.steps=3"
    assert calls[1:] == ["exec --nv image.sif d2v-ds train run.dir=run run.steps=3"] * 2


def test_options_for_pyxis_reach_every_srun(cluster: Cluster, tmp_path: Path) -> None:
    """pyxis adds options to srun; here a wrapper records and removes them."""
    shim = tmp_path / "bin/srun"
    shim.parent.mkdir()
    shim.write_text(
        "#!/bin/bash\nwords=()\nfor word; do\n"
        f'  if [[ $word == --container-image=* ]]; then echo "$*" >>{tmp_path}/calls\n'
        '  else words+=("$word"); fi\ndone\n'
        'exec "$(type -ap srun | sed -n 2p)" "${words[@]}"\n'
    )
    shim.chmod(0o755)
    more = f"export PATH={shim.parent}:$PATH\nSRUN_OPTIONS=(--container-image=image.sqsh)\n"
    where = place(cluster, tmp_path / "home", more)
    options = ("--nodes=2", *SMALL)
    where.submit("pretrain.sbatch", "run.dir=run", "run.steps=3", options=options).ends()
    check, ranks = (tmp_path / "calls").read_text().split("--container-image=image.sqsh ")[1:]
    assert check.startswith("d2v-ds train --check") and ranks.startswith("bash -c")
