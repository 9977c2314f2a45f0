"""Faults that affect the whole cluster, with the stand-in: a lost node, preemption."""

from __future__ import annotations

import pytest

from tests.slurm.cluster import Cluster, Workplace
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
