"""The real trainer under the real batch script: an interrupted run loses nothing."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from d2v_ds.run.run_folder import RunFolder
from d2v_ds.run.status import describe
from shards import samples
from shards.cli import main as shards_main
from tests.slurm.cluster import Cluster, Job, Workplace

pytestmark = pytest.mark.usefixtures("whole_cluster")

TINY = (
    "modality.speech.views=2",
    "model.dim=32",
    "model.depth=2",
    "target.top_k=2",
    "modality.speech.convs="
    "[[8, 10, 5], [8, 3, 2], [8, 3, 2], [16, 3, 2], [16, 3, 2], [16, 2, 2], [16, 2, 2]]",
    "modality.speech.positions.groups=4",
    "modality.speech.decoder={dim: 16, depth: 2, kernel: 5, groups: 4, dropout: 0.1}",
    "modality.speech.crop_seconds=0.8",
    "modality.speech.min_seconds=0.4",
    "optim.warmup_steps=3",
    "optim.schedule=constant",
    "engine.config=zero3",
    "log.every=1",
    "data.workers=1",
    "run.threads=1",
)
TWO_NODES = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=2")
SHORT, ENDLESS = 30, 1_000_000  # steps


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shards") / "train"
    source = samples.path("speech") / "train.tsv"
    join = ["--join", "speaker", "--join-seconds", "4"]
    assert shards_main(["speech", str(source), str(out), *join]) == 0
    return out


def arguments(run: str | Path, shards: Path, steps: int, *settings: str) -> list[str]:
    words = ["speech_tiny", f"run.dir={run}", f"data.shards={shards}", *TINY]
    return [*words, f"run.steps={steps}", *settings]


def losses(run: RunFolder) -> dict[int, float]:
    if not run.metrics.exists():
        return {}
    lines = run.metrics.read_text().splitlines(keepends=True)
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    steps = [row["step"] for row in rows]
    assert steps == sorted(set(steps)), f"rows overlap: {steps}"
    return {row["step"]: row["loss"] for row in rows}


def curve(run: RunFolder) -> list[int]:
    """The steps of the loss curve in TensorBoard."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.tensorboard), size_guidance={"scalars": 0})
    events.Reload()
    return [event.step for event in events.Scalars("loss/total")]


class Reference:
    """An uninterrupted run on this machine, started with the first job and as long as the longest
    run that is compared with it."""

    def __init__(self, folder: Path, shards: Path) -> None:
        self.folder, self.shards = folder, shards
        self.steps = 0
        self.begin(SHORT)

    def begin(self, steps: int) -> None:
        self.steps, self.run = steps, RunFolder(self.folder / str(steps))
        command = [sys.executable, "-m", "d2v_ds", "train", "--nproc", "2"]
        self.process = subprocess.Popen(
            [*command, *arguments(self.run.root, self.shards, steps, "save.every=100000")],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
        )

    def losses(self, steps: int) -> dict[int, float]:
        """The losses of its first steps."""
        if steps > self.steps:
            assert self.process.wait(400) == 0
            self.begin(steps)
        assert self.process.wait(400) == 0
        return {step: loss for step, loss in losses(self.run).items() if step <= steps}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Iterator[Reference]:
    reference = Reference(tmp_path_factory.mktemp("undisturbed"), shards)
    yield reference
    reference.process.terminate()
    reference.process.wait()


def start(
    place: Workplace, shards: Path, steps: int, *settings: str, options: tuple[str, ...] = ()
) -> tuple[Job, RunFolder]:
    """Starts a job, waits for its first steps, and returns it with its run folder."""
    run = RunFolder(place.folder / "runs/run")
    words = arguments("runs/run", shards, steps, *settings)
    job = place.submit("pretrain.sbatch", *words, options=(*TWO_NODES, *options))
    job.until(lambda: len(losses(run)) >= 3, "three steps", 150)
    return job, run


def stop(job: Job, run: RunFolder) -> None:
    """Stops a run after enough steps."""
    run.stop.touch()
    job.ends()


def assert_as_undisturbed(run: RunFolder, undisturbed: Reference) -> None:
    """No step is lost or repeated, and every loss is bit-identical."""
    taken = losses(run)
    steps = len(taken)
    marker = run.done if run.done.exists() else run.stopped
    assert json.loads(marker.read_text())["step"] == steps
    assert list(taken) == list(range(1, steps + 1)) == curve(run)
    assert taken == undisturbed.losses(steps)


def test_a_signalled_run_on_two_nodes_resumes_bit_exactly(
    trainer: Workplace, shards: Path, undisturbed: Reference
) -> None:
    job, run = start(trainer, shards, SHORT, "save.every=100")
    status = describe(run.root)
    assert "state        running: " in status and "slowest rank" in status
    job.signal()
    job.says("requeue: stopped and saved", 60)
    saved = run.steps()
    job.ends(seconds=150)
    assert job.field("Restarts") == "1" and len(saved) == 1 and 3 <= saved[0] < SHORT
    assert f"resuming at step {saved[0]}" in job.log()
    assert len(losses(run)) == SHORT
    assert_as_undisturbed(run, undisturbed)
    described = json.loads(run.environment.read_text())
    assert described["nodes"] == ["vn1", "vn2"]
    assert (run.code / f"{described['code']}.tar.gz").is_file()
    logs = {str(p.relative_to(run.root / "logs")) for p in run.root.glob("logs/*/rank*.txt")}
    assert logs == {f"{job.number}.{r}/rank0000{rank}.txt" for r in (0, 1) for rank in (0, 1)}


# --------------------------------------------------------------------------- slow: real faults


@pytest.mark.slow
def test_a_run_survives_the_loss_of_a_node(
    trainer: Workplace, cluster: Cluster, shards: Path, undisturbed: Reference
) -> None:
    job, run = start(trainer, shards, SHORT, "save.every=2")
    job.until(run.steps, "a checkpoint", 60)
    cluster("crash", "vn2")
    job.says(rf"job {job.number}\.1: 2 ranks on vn\[1,3\]", 120)
    job.ends(seconds=200)
    assert "resuming at step" in job.log()
    assert_as_undisturbed(run, undisturbed)


@pytest.mark.slow
def test_a_replaced_job_behind_a_pulled_cable_cannot_write(
    trainer: Workplace, cluster: Cluster, shards: Path, undisturbed: Reference
) -> None:
    """Ranks and batch script keep running behind the pulled cable and still see the shared disk."""
    if not cluster.namespaces:
        pytest.skip("no cables: the nodes have no network of their own (needs root)")
    options = ("--nodes=1", "--ntasks-per-node=2")
    job, run = start(trainer, shards, ENDLESS, "save.every=5", options=options)
    old, cut_at = job.field("NodeList"), max(losses(run))
    cluster("cut", old)
    cluster.command("scontrol", "update", f"nodename={old}", "state=down", "reason=cut")
    job.until(lambda: job.field("Restarts") == "1", "the requeue", 90)
    job.until(lambda: max(losses(run)) > cut_at, "steps after the cut", 20)
    behind = run.root / f"logs/{job.number}.0/rank00000.txt"
    job.says(rf"job {job.number}\.1: ", 60)
    job.until(lambda: "is owned by generation 2" in behind.read_text(), "the fence", 90)
    replaced_at = run.steps()[-1]
    cluster("heal", old)
    job.until(lambda: max(losses(run)) > replaced_at + 10, "steps of the new start", 120)
    assert job.field("NodeList") != old
    stop(job, run)
    assert_as_undisturbed(run, undisturbed)


@pytest.mark.slow
def test_a_run_continues_across_time_limits(
    trainer: Workplace, shards: Path, undisturbed: Reference
) -> None:
    # Slurm may send the signal a minute early; the first steps take half a minute.
    options = ("--time=2", "--signal=B:USR2@20")
    job, run = start(trainer, shards, ENDLESS, "save.every=100000", options=options)
    job.says(r"resuming at step \d+", 250)
    steps = len(losses(run))
    job.until(lambda: len(losses(run)) > steps, "steps after the time limit", 60)
    stop(job, run)
    assert int(job.field("Restarts")) >= 1  # a slow machine reaches the limit again
    assert_as_undisturbed(run, undisturbed)


@pytest.mark.slow
def test_a_run_resumes_after_preemption(
    trainer: Workplace, cluster: Cluster, shards: Path, undisturbed: Reference
) -> None:
    job, run = start(trainer, shards, SHORT, "save.every=1000", options=("--exclusive",))
    urgent = trainer.folder / "urgent.sh"
    urgent.write_text("#!/bin/sh\nsleep 1\n")
    words = ("--partition=urgent", "--nodes=3", "--exclusive", str(urgent))
    assert cluster.command("sbatch", *words, cwd=trainer.folder).returncode == 0
    job.says("stop requested", 30).ends(seconds=200)
    assert job.field("Restarts") == "1"
    assert_as_undisturbed(run, undisturbed)


@pytest.mark.slow
def test_a_stopped_rank_is_named_and_the_run_resumes(
    trainer: Workplace, shards: Path, undisturbed: Reference
) -> None:
    trainer.settings.write_text(
        trainer.settings.read_text() + "export D2V_HANG_SECONDS=20 D2V_DUMP_SECONDS=5\n"
    )
    job, run = start(trainer, shards, SHORT, "save.every=2", options=("--nodelist=vn[1-2]",))
    [rank] = [
        process
        for process in psutil.process_iter(["cmdline"])
        if process.info["cmdline"]
        and "d2v_ds" in process.info["cmdline"]
        and process.environ().get("SLURM_JOB_ID") == job.number
        and process.environ().get("SLURM_PROCID") == "1"
        and process.parent().name() == "bash"
    ]
    rank.send_signal(signal.SIGSTOP)
    job.says("requeue: ", 90)
    logs = run.root / f"logs/{job.number}.0"
    assert re.search(r"silent: rank 1 on vn2|rank 1 on vn2 is silent", (logs / "hung").read_text())
    assert "run_steps" in (logs / "stacks-rank00000.txt").read_text()
    job.ends(seconds=200)
    assert_as_undisturbed(run, undisturbed)


@pytest.mark.slow
def test_each_node_reads_its_own_copy_of_the_shards(
    trainer: Workplace, cluster: Cluster, shards: Path, undisturbed: Reference
) -> None:
    if not cluster.namespaces:
        pytest.skip("the nodes have no disks of their own (needs root)")
    local = cluster.folder / "local"
    trainer.settings.write_text(trainer.settings.read_text() + f"export D2V_STAGE={local}\n")
    job, run = start(trainer, shards, SHORT, "save.every=100")
    job.ends(seconds=150)
    assert_as_undisturbed(run, undisturbed)
    assert not list(local.iterdir()), "a copy on the shared file system"
    for node in ("vn1", "vn2"):
        found = cluster("exec", node, "find", str(local), "-name", "index.json")
        assert len(found.splitlines()) == 1, node


@pytest.mark.slow
def test_two_real_jobs_on_the_same_nodes_do_not_interfere(
    trainer: Workplace, cluster: Cluster, shards: Path, undisturbed: Reference
) -> None:
    """Both get the same port: the second job finds it taken and uses another one."""
    trainer.settings.write_text(trainer.settings.read_text() + "export MASTER_PORT=23456\n")
    jobs = []
    for name in ("one", "two"):
        words = arguments(f"runs/{name}", shards, SHORT, "save.every=100")
        jobs.append(trainer.submit("pretrain.sbatch", *words, options=TWO_NODES))
    for job, name in zip(jobs, ("one", "two"), strict=True):
        job.ends(seconds=250)
        assert job.field("NodeList") == "vn[1-2]"
        assert_as_undisturbed(RunFolder(trainer.folder / "runs" / name), undisturbed)
