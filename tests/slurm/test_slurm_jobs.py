"""The batch scripts against a real Slurm, with a stand-in for the training: see standin/d2v-ds."""

from __future__ import annotations

import re
import subprocess
import time
from pathlib import Path

import pytest
from cluster import SCRIPTS, Cluster, Job, Workplace

NODES = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1")


def pretrain(place: Workplace, *words: str, options: tuple[str, ...] = ()) -> Job:
    return place.submit("pretrain.sbatch", "run.dir=run", *words, options=(*NODES, *options))


def starts(place: Workplace, run: str = "run") -> list[int]:
    """For each step in metrics.jsonl, which restart of the job took it."""
    rows = place.rows(run)
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1)), "overlap or gap"
    return [row["restart"] for row in rows]


def step_reached(place: Workplace, step: int, run: str = "run") -> bool:
    return len(place.rows(run)) >= step


# ------------------------------------------------------------------------------ ends and restarts


def test_a_signal_lets_the_ranks_save_then_the_job_is_requeued(standin: Workplace) -> None:
    """Rank 1 ends at once, rank 0 saves for 4 s after it: more than Slurm would wait (KillWait)."""
    job = pretrain(standin, "run.steps=40", "save_seconds=4")
    job.until(lambda: step_reached(standin, 5), "five steps")
    job.signal()
    job.ends()
    assert job.field("Restarts") == "1"
    assert set(starts(standin)) == {0, 1} and len(starts(standin)) == 40
    assert re.search(r"asked to stop.*\n(.*\n)*.*requeue: stopped well", job.log())
    logs = standin.folder / "run/logs"
    assert "rank 1 begins at step 0" in (logs / f"{job.number}.0/rank00001.txt").read_text()
    assert "rank 1 begins" not in job.log() and "rank 0 begins at step 0" in job.log()
    assert "NodeList=vn[1-2]" in (logs / f"{job.number}.1/job.txt").read_text()


def test_a_preempted_job_saves_and_comes_back(standin: Workplace, cluster: Cluster) -> None:
    job = pretrain(standin, "run.steps=60", options=("--exclusive", "--nodes=3"))
    job.until(lambda: step_reached(standin, 5), "five steps")
    urgent = standin.folder / "urgent.sh"
    urgent.write_text("#!/bin/sh\nsleep 1\n")
    options = ("--partition=urgent", "--nodes=3", "--exclusive", str(urgent))
    assert cluster.command("sbatch", *options, cwd=standin.folder).returncode == 0
    job.says("asked to stop", 20).ends()
    assert set(starts(standin)) == {0, 1}


def test_a_crash_ends_all_ranks_with_its_own_code(standin: Workplace) -> None:
    began = time.monotonic()
    job = pretrain(standin, "run.steps=1000", "crash=1:5:9").ends("FAILED")
    assert time.monotonic() - began < 20
    assert job.code == 9 and job.field("Restarts") == "0"
    assert "rank 1 on vn2 ended with exit code 9" in job.log()
    assert "it lost its GPU" in job.log()  # the last words of that rank's own log


def test_a_crash_does_not_end_a_rank_that_is_saving(standin: Workplace) -> None:
    """Rank 1 fails as soon as rank 0 has begun a save of 5 s, longer than KillWait."""
    job = pretrain(standin, "run.steps=5", "save_seconds=5", "crash=1:5:9").ends("FAILED")
    assert job.code == 9
    assert (standin.folder / "run/checkpoints/00000005").is_dir()


def test_a_silent_rank_is_named_and_the_job_goes_on(standin: Workplace) -> None:
    job = pretrain(standin, "run.steps=80", "hang=1:5").ends()
    assert job.field("Restarts") == "1"
    assert re.search(r"no heartbeat for 4 s from rank 1 on vn2", job.log())
    hung = (standin.folder / f"run/logs/{job.number}.0/hung").read_text()
    assert hung == "silent: rank 1 on vn2\n"
    assert (standin.folder / "run/DONE").exists()


def test_restarts_without_progress_come_to_an_end(standin: Workplace) -> None:
    settings = standin.settings.read_text() + "export D2V_MAX_FRUITLESS=1\n"
    standin.settings.write_text(settings)
    job = pretrain(standin, "idle=1").ends("FAILED")
    assert job.field("Restarts") == "2"
    assert "2 restarts without a new checkpoint: giving up" in job.log()


def test_a_stop_file_ends_the_job_without_a_restart(standin: Workplace) -> None:
    job = pretrain(standin, "run.steps=1000")
    job.until(lambda: step_reached(standin, 3), "three steps")
    (standin.folder / "run/STOP").touch()
    job.ends()
    assert job.field("Restarts") == "0" and "remove it and submit again" in job.log()
    assert (standin.folder / "run/STOPPED").exists()


def test_scancel_saves_and_is_final(standin: Workplace, cluster: Cluster) -> None:
    job = pretrain(standin, "run.steps=1000")
    job.until(lambda: step_reached(standin, 3), "three steps")
    cluster.command("scancel", job.number)
    job.ends("CANCELLED")
    assert list((standin.folder / "run/checkpoints").iterdir())
    time.sleep(1)
    assert job.state == "CANCELLED" and job.field("Restarts") == "0"


def test_wrong_arguments_end_with_one_line_and_code_2(standin: Workplace) -> None:
    job = pretrain(standin, "nonsense").ends("FAILED")
    assert job.code == 2 and job.log() == "d2v-ds: unknown recipe 'nonsense'\n"
    assert not (standin.folder / "run").exists()


# ------------------------------------------------------------------------------------------- nodes


def test_an_unfit_node_is_named_and_left_out(standin: Workplace) -> None:
    standin.settings.write_text(
        standin.settings.read_text()
        + "NODE_CHECK='if [ $SLURMD_NODENAME = vn1 ]; then echo a fan is loud; fi'\n"
    )
    job = pretrain(standin, "run.steps=10").ends()
    assert "node vn1 is not fit: NODE_CHECK says: a fan is loud" in job.log()
    assert job.field("NodeList") == "vn[2-3]" and job.field("Restarts") == "1"


def test_a_node_that_the_ranks_find_unfit_is_left_out(standin: Workplace) -> None:
    job = pretrain(standin, "run.steps=10", "unfit=vn2").ends()
    assert job.field("NodeList") == "vn[1,3]" and "requeue: without vn2" in job.log()


def test_a_cause_that_all_nodes_share_is_no_reason_to_go_on(standin: Workplace) -> None:
    standin.settings.write_text(
        standin.settings.read_text() + "export D2V_MIN_FREE_MB=1000000000\n"
    )
    job = pretrain(standin, "run.steps=10").ends("FAILED")
    assert re.search(r"node vn2 is not fit: .*: \d+ MB are free, 1000000000 must be", job.log())
    assert "no node is fit, so the cause is probably common to all" in job.log()


def test_a_lost_node_is_replaced(standin: Workplace, cluster: Cluster) -> None:
    job = pretrain(standin, "run.steps=600")
    job.until(lambda: step_reached(standin, 3), "three steps")
    cluster("crash", "vn2")
    cluster.command("scontrol", "update", "nodename=vn2", "state=down", "reason=test")
    job.says(r"job \d+\.1: 2 ranks on vn\[1,3\]", 60)
    rows = len(standin.rows("run"))
    job.until(lambda: step_reached(standin, rows + 3), "more steps")


def test_two_jobs_share_a_node(standin: Workplace) -> None:
    jobs = [
        standin.submit("pretrain.sbatch", f"run.dir={name}", "run.steps=20", options=NODES)
        for name in ("one", "two")
    ]
    for job, name in zip(jobs, ("one", "two"), strict=True):
        job.ends()
        assert job.field("NodeList") == "vn[1-2]"
        assert {row["job"] for row in standin.rows(name)} == {job.number}


# ----------------------------------------------------------------------------------------- scripts


def scripts() -> list[Path]:
    found = sorted(p for p in SCRIPTS.iterdir() if p.suffix in {".sbatch", ".sh"})
    assert len(found) >= 6
    return found


COMMANDS = [p for p in scripts() if p.suffix == ".sbatch" or p.name == "pipeline.sh"]


def test_shellcheck_is_clean() -> None:
    files = [*scripts(), SCRIPTS / "cluster.env.example"]
    done = subprocess.run(["shellcheck", "-x", *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", COMMANDS, ids=lambda path: path.name)
def test_every_script_explains_itself(script: Path) -> None:
    done = subprocess.run([script, "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and script.name in done.stdout and not done.stderr
    done = subprocess.run([script], capture_output=True, text=True)
    assert done.returncode == 2 and script.name in done.stderr


@pytest.mark.parametrize("script", sorted(SCRIPTS.glob("*.sbatch")), ids=lambda path: path.name)
def test_slurm_accepts_every_script(script: Path, cluster: Cluster) -> None:
    done = cluster.command("sbatch", "--test-only", str(script), "anything")
    assert done.returncode == 0, done.stderr
