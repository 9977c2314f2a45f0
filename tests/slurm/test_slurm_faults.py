"""Faults that affect the whole cluster, with the stand-in: a lost node, preemption, an outage of
the controller."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Callable

import pytest

from tests.slurm.cluster import Cluster, Job, Workplace
from tests.slurm.test_slurm_jobs import FIRST_TWO, NODES, reaches_step, starts

pytestmark = pytest.mark.usefixtures("whole_cluster")


def test_a_lost_node_is_replaced(standin: Workplace, cluster: Cluster) -> None:
    job = standin.submit("pretrain.sbatch", "run.dir=run", "run.steps=600", options=NODES)
    reaches_step(job, standin, 3)
    lost = job.field("NodeList").rstrip("]")[-1]
    cluster("crash", f"vn{lost}")
    job.says(rf"job {job.number}\.1: 2 ranks on vn", 60)
    rows = len(standin.rows("run"))
    reaches_step(job, standin, rows + 3)


@pytest.mark.slow
def test_a_preempted_job_saves_and_resumes(standin: Workplace, cluster: Cluster) -> None:
    options = (*NODES, "--exclusive", "--nodes=3")
    job = standin.submit("pretrain.sbatch", "run.dir=run", "run.steps=60", options=options)
    reaches_step(job, standin, 5)
    urgent = standin.folder / "urgent.sh"
    urgent.write_text("#!/bin/sh\nsleep 1\n")
    words = ("--partition=urgent", "--nodes=3", "--exclusive", str(urgent))
    assert cluster.command("sbatch", *words, cwd=standin.folder).returncode == 0
    job.says("stop requested", 20).ends()
    assert set(starts(standin)) == {0, 1}


@pytest.mark.slow
def test_a_job_whose_ranks_got_sigterm_resumes(standin: Workplace, cluster: Cluster) -> None:
    """A preemption without an early signal: the ranks get SIGTERM at once."""
    options = (*NODES, *FIRST_TWO)
    job = standin.submit("pretrain.sbatch", "run.dir=run", "run.steps=40", options=options)
    reaches_step(job, standin, 5)
    cluster.command("scancel", "--signal=TERM", f"{job.number}.1")
    job.ends()
    assert set(starts(standin)) == {0, 1} and len(starts(standin)) == 40


def loses_its_controller(job: Job, place: Workplace, cluster: Cluster) -> None:
    """Kills the controller when it has saved that the job runs, which it does every 5 s."""
    saved = cluster.folder / "state/job_state"
    reaches_step(job, place, 5)
    began = time.time()
    job.until(lambda: saved.stat().st_mtime > began + 1, "a saved state")
    cluster("killctl")


def log_of(job: Job, place: Workplace) -> str:
    """Without asking the controller for its path."""
    return (place.folder / f"d2v-pretrain-{job.number}.out").read_text()


def until(reached: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 120
    while not reached():
        assert time.monotonic() < deadline, f"{what} not within 120 s"
        time.sleep(0.1)


def says_offline(job: Job, place: Workplace, text: str) -> None:
    until(lambda: text in log_of(job, place), text)


@pytest.mark.slow
def test_a_stopped_job_is_requeued_when_the_controller_is_back(
    standin: Workplace, cluster: Cluster
) -> None:
    words = ("run.dir=run", "run.steps=200")
    job = standin.submit("pretrain.sbatch", *words, options=(*NODES, *FIRST_TWO))
    after = standin.submit("run.sbatch", "touch", "next", options=(f"-dafterok:{job.number}",))
    loses_its_controller(job, standin, cluster)
    job.script().send_signal(signal.SIGUSR2)
    says_offline(job, standin, "stop requested")
    stopped = standin.folder / "run/STOPPED"
    until(stopped.exists, "STOPPED")
    time.sleep(20)  # longer than a command of Slurm waits for the controller
    assert ": requeue: " not in log_of(job, standin)
    cluster("bootctl")
    job.ends(seconds=120)
    assert job.field("Restarts") == "1" and len(starts(standin)) == 200
    after.ends()
    assert (standin.folder / "run/DONE").stat().st_mtime < (standin.folder / "next").stat().st_mtime


@pytest.mark.slow
def test_a_hanging_job_is_requeued_when_the_controller_is_back(
    standin: Workplace, cluster: Cluster
) -> None:
    standin.settings.write_text(standin.settings.read_text() + "export D2V_HANG_SECONDS=20\n")
    words = ("run.dir=run", "run.steps=200", "hang=1:5")
    job = standin.submit("pretrain.sbatch", *words, options=(*NODES, *FIRST_TWO))
    loses_its_controller(job, standin, cluster)
    says_offline(job, standin, "the controller of Slurm is away")
    cluster("bootctl")
    job.ends(seconds=120)
    assert job.field("Restarts") == "1" and (standin.folder / "run/DONE").exists()


@pytest.mark.slow
def test_a_job_fails_if_the_controller_stays_away(standin: Workplace, cluster: Cluster) -> None:
    """Its exit code is not 0: stages that wait for the job must not start."""
    standin.settings.write_text(standin.settings.read_text() + "export D2V_CONTROLLER_SECONDS=1\n")
    words = ("run.dir=run", "run.steps=600")
    job = standin.submit("pretrain.sbatch", *words, options=(*NODES, *FIRST_TWO))
    loses_its_controller(job, standin, cluster)
    job.script().send_signal(signal.SIGUSR2)
    says_offline(job, standin, "the run is not finished, and the job cannot requeue itself")
    cluster("bootctl")
    job.ends("FAILED", seconds=120)
    assert job.code == 1


def test_a_clock_that_is_set_is_not_a_hang(standin: Workplace, cluster: Cluster) -> None:
    """As seen from the node of the batch script, every heartbeat is an hour old."""
    standin.settings.write_text(standin.settings.read_text() + "export D2V_HANG_SECONDS=3\n")
    words = ("run.dir=run", "run.steps=80", "clock=-3600")
    job = standin.submit("pretrain.sbatch", *words, options=(*NODES, *FIRST_TWO))
    job.ends()
    assert job.field("Restarts") == "0"


def test_a_missing_cluster_env_is_named(standin: Workplace, cluster: Cluster) -> None:
    standin.settings.unlink()
    job = standin.submit("pretrain.sbatch", "run.dir=run", options=NODES).ends("FAILED")
    assert job.code == 2
    assert f"D2V_CLUSTER_ENV names {standin.settings}, which does not exist" in job.log()
    standin.settings.write_text("export PATH=/usr/bin:/bin\n")
    job = standin.submit("pretrain.sbatch", "run.dir=run", options=NODES).ends("FAILED")
    assert job.code == 2
    assert re.search(
        rf"d2v-ds: not found on vn\d; the environment that {standin.settings}", job.log()
    )
    standin.settings.write_text("export PATH=(\n")
    job = standin.submit("pretrain.sbatch", "run.dir=run", options=NODES).ends("FAILED")
    assert job.code == 2 and f"{standin.settings}: cannot be read as bash" in job.log()
