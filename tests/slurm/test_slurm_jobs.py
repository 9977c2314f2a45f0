"""pretrain.sbatch on a real Slurm with a stand-in for the training: see standin/d2v-ds.

All jobs are submitted at once and run concurrently; each test waits for its own job.
"""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from d2v_ds import exit_codes
from tests.slurm.cluster import SCRIPTS, Cluster, Job, Workplace
from tests.slurm.conftest import standin_settings

NODES = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1")
FIRST_TWO = ("--nodelist=vn[1-2]",)

JOBS: dict[str, tuple[list[str], tuple[str, ...], str]] = {  # arguments, options, cluster.env
    # rank 1 exits at once, rank 0 saves for 4 s: longer than Slurm's KillWait
    "signal": (["run.steps=40", "save_seconds=4"], (), ""),
    "crash": (["run.steps=1000", "crash=1:5:9"], FIRST_TWO, ""),
    # rank 1 fails when rank 0 has started a save of 5 s
    "crash in a save": (["run.steps=5", "save_seconds=5", "crash=1:5:9"], (), ""),
    "hang": (["run.steps=120", "hang=1:5"], FIRST_TWO, "export D2V_HANG_SECONDS=8"),
    "idle": (["idle=1"], (), "export D2V_MAX_FRUITLESS=1"),
    "STOP": (["run.steps=1000"], (), ""),
    "scancel": (["run.steps=1000"], (), ""),
    "nonsense": (["nonsense"], (), ""),
    "loud fan": (
        ["run.steps=10"],
        (),
        "NODE_CHECK='if [ $SLURMD_NODENAME = vn1 ]; then echo a fan is loud; fi'",
    ),
    "unfit ranks": (["run.steps=10", "unfit=vn2"], (), ""),
    "full disks": (["run.steps=10"], (), "export D2V_MIN_FREE_MB=1000000000"),
    "bare": (["run.steps=5"], ("--export=D2V_CLUSTER_ENV",), ""),
    "one": (["run.steps=20"], FIRST_TWO, ""),
    "two": (["run.steps=20"], FIRST_TWO, ""),
}

Submitted = Callable[[str], tuple[Workplace, Job]]


@pytest.fixture(scope="module")
def submitted(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Submitted]:
    """submitted(name): the folder and the job of that name. Its run folder is `run`."""
    folder = tmp_path_factory.mktemp("jobs")
    jobs = {}
    for name, (words, options, settings) in JOBS.items():
        place = Workplace(cluster, folder / name, f"{standin_settings()}{settings}\n")
        arguments = ["run.dir=run", *words]
        jobs[name] = (
            place,
            place.submit("pretrain.sbatch", *arguments, options=(*NODES, *options)),
        )
    yield jobs.__getitem__


def starts(place: Workplace, run: str = "run") -> list[int]:
    """For each step in metrics.jsonl, the number of the restart that trained it."""
    rows = place.rows(run)
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1)), "overlap or gap"
    return [row["restart"] for row in rows]


def reaches_step(job: Job, place: Workplace, step: int) -> None:
    job.until(lambda: len(place.rows("run")) >= step, f"step {step}")


def test_wrong_arguments_end_with_one_line_and_exit_code_2(submitted: Submitted) -> None:
    place, job = submitted("nonsense")
    job.ends("FAILED")
    assert job.code == 2 and job.log() == "d2v-ds: unknown recipe 'nonsense'\n"
    assert not (place.folder / "run").exists()


def test_a_signalled_job_saves_and_is_requeued(submitted: Submitted) -> None:
    place, job = submitted("signal")
    reaches_step(job, place, 5)
    job.signal()
    job.ends()
    assert job.field("Restarts") == "1"
    assert set(starts(place)) == {0, 1} and len(starts(place)) == 40
    assert re.search(r"stop requested.*\n(.*\n)*.*requeue: stopped and saved", job.log())
    logs = place.folder / "run/logs"
    assert "rank 1 begins at step 0" in (logs / f"{job.number}.0/rank00001.txt").read_text()
    assert "rank 1 begins" not in job.log() and "rank 0 begins at step 0" in job.log()
    assert re.search(r" NodeList=vn\[", (logs / f"{job.number}.1/job.txt").read_text())


def test_a_stop_file_ends_the_job_without_a_restart(submitted: Submitted) -> None:
    place, job = submitted("STOP")
    reaches_step(job, place, 3)
    (place.folder / "run/STOP").touch()
    job.ends()
    assert job.field("Restarts") == "0" and "remove it and submit the job again" in job.log()
    assert (place.folder / "run/STOPPED").exists()


def test_scancel_saves_without_a_restart(submitted: Submitted, cluster: Cluster) -> None:
    place, job = submitted("scancel")
    reaches_step(job, place, 3)
    cluster.command("scancel", job.number)
    job.ends("CANCELLED")
    assert list((place.folder / "run/checkpoints").iterdir())
    time.sleep(1)
    assert job.state == "CANCELLED" and job.field("Restarts") == "0"


def test_a_crash_ends_all_ranks_with_its_own_code(submitted: Submitted) -> None:
    place, job = submitted("crash")
    job.ends("FAILED")
    assert job.code == 9 and job.field("Restarts") == "0"
    assert "rank 1 on vn2 failed with exit code 9" in job.log()
    assert "it lost its GPU" in job.log()  # from the end of that rank's own log
    assert len(place.rows("run")) < 200, "rank 0 kept running"


def test_a_crash_does_not_end_a_rank_that_is_saving(submitted: Submitted) -> None:
    place, job = submitted("crash in a save")
    job.ends()  # the run is finished, whatever the exit codes of its ranks
    assert "finished; a rank ended with exit code 9 afterwards" in job.log()
    assert (place.folder / "run/checkpoints/00000005").is_dir()


def test_a_silent_rank_is_named_and_the_job_continues(submitted: Submitted) -> None:
    place, job = submitted("hang")
    job.ends()
    assert job.field("Restarts") == "1"
    assert "no heartbeat for 8 s from rank 1 on vn2" in job.log()
    hung = (place.folder / f"run/logs/{job.number}.0/hung").read_text()
    assert hung == "silent: rank 1 on vn2\n"
    assert (place.folder / "run/DONE").exists()


def test_a_job_without_progress_gives_up(submitted: Submitted) -> None:
    _, job = submitted("idle")
    job.ends("FAILED")
    assert job.field("Restarts") == "2"
    assert "giving up after 2 restarts without a new checkpoint" in job.log()


def test_an_unfit_node_is_named_and_excluded(submitted: Submitted) -> None:
    _, job = submitted("loud fan")
    job.ends()
    assert "node vn1 is unfit: NODE_CHECK reports: a fan is loud" in job.log()
    assert job.field("NodeList") == "vn[2-3]" and job.field("Restarts") == "1"


def test_a_node_that_the_ranks_report_as_unfit_is_excluded(submitted: Submitted) -> None:
    _, job = submitted("unfit ranks")
    job.ends()
    assert job.field("NodeList") == "vn[1,3]" and "requeue: without vn2" in job.log()


def test_a_job_whose_nodes_are_all_unfit_fails(submitted: Submitted) -> None:
    _, job = submitted("full disks")
    job.ends("FAILED")
    assert re.search(
        r"node vn\d is unfit: .* has \d+ MB free, D2V_MIN_FREE_MB requires 1000000000", job.log()
    )
    assert "all nodes of the job are unfit" in job.log()


def test_a_job_needs_nothing_from_the_submitting_shell(submitted: Submitted) -> None:
    place, job = submitted("bare")
    job.ends()
    assert len(place.rows("run")) == 5


def test_two_jobs_share_their_nodes(submitted: Submitted) -> None:
    for name in ("one", "two"):
        place, job = submitted(name)
        job.ends()
        assert job.field("NodeList") == "vn[1-2]"
        assert {row["job"] for row in place.rows("run")} == {job.number}


# ----------------------------------------------------------------------------------------- scripts


def scripts() -> list[Path]:
    found = sorted(p for p in SCRIPTS.iterdir() if p.suffix in {".sbatch", ".sh"})
    assert len(found) >= 8
    return found


COMMANDS = [p for p in scripts() if p.suffix == ".sbatch" or p.name == "pipeline.sh"]


def test_exit_codes_match_the_package() -> None:
    text = (SCRIPTS / "common.sh").read_text()
    codes = dict(re.findall(r"\b([A-Z_]+)=(\d+)", re.findall(r"^BAD_INPUT=.*$", text, re.M)[0]))
    assert codes.keys() == {"BAD_INPUT", "UNHEALTHY", "UNFIT", "HUNG"}
    for name, code in codes.items():
        assert int(code) == getattr(exit_codes, name), name


def test_shellcheck_is_clean() -> None:
    files = [*scripts(), SCRIPTS / "cluster.env.example"]
    done = subprocess.run(["shellcheck", "-x", *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", COMMANDS, ids=lambda path: path.name)
def test_every_script_has_help(script: Path) -> None:
    done = subprocess.run([script, "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and f"slurm/{script.name}" in done.stdout and not done.stderr
    done = subprocess.run([script], capture_output=True, text=True)
    assert done.returncode == 2 and f"slurm/{script.name}" in done.stderr


@pytest.mark.parametrize("script", sorted(SCRIPTS.glob("*.sbatch")), ids=lambda path: path.name)
def test_slurm_accepts_every_script(script: Path, cluster: Cluster) -> None:
    done = cluster.command("sbatch", "--test-only", str(script), "anything")
    assert done.returncode == 0, done.stderr
