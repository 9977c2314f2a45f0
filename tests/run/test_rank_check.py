"""Checks before training: errors for inconsistent ranks, and which node they name."""

from __future__ import annotations

import dataclasses
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from d2v_ds.config import Config, Run
from d2v_ds.distributed import collectives
from d2v_ds.errors import UserError
from d2v_ds.run import rank_check
from d2v_ds.run.preflight import Finding, UnfitNodes, leave_token, unfit
from d2v_ds.run.rank_check import check_ranks, warn_of_too_few_cores
from d2v_ds.run.run_folder import RunFolder

RunRanks = Callable[..., list[Any]]


def finding(node: str, **changed: Any) -> Finding:
    return dataclasses.replace(Finding(node, "code", "config", True, 10**12, True), **changed)


def test_consistent_ranks() -> None:
    assert unfit([finding("a"), finding("a"), finding("b")]) == {}


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"sees_run": False, "free": 0}, "does not see the run folder"),
        ({"code": "old"}, "differs in code from most ranks"),
        ({"config": "old"}, "differs in settings from most ranks"),
        ({"right_sum": False}, "an all-reduce over the ranks fails (wrong sum or timeout)"),
    ],
)
def test_the_node_that_differs_is_named(changed: dict[str, Any], reason: str) -> None:
    assert unfit([finding("a"), finding("b", **changed), finding("c")]) == {"b": reason}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"code": "old"}, r"the ranks have different code: a / b; start all from the same files"),
        ({"free": 10**6}, r"run\.dir: its disk has 1 MB free"),
    ],
)
def test_errors_that_another_node_would_not_fix(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        unfit([finding("a"), finding("b", **changed)])


def test_wrong_sums_on_all_nodes_name_no_node() -> None:
    with pytest.raises(UserError, match=r"on all nodes .*; check the network"):
        unfit([finding("a", right_sum=False), finding("b", right_sum=False)])


# ------------------------------------------------------------------------------------- real ranks


def check(root: str, how: str) -> list[str] | str:
    os.environ["SLURMD_NODENAME"] = f"node{dist.get_rank()}"
    config = Config(run=Run(dir=root))
    if how == "other settings" and dist.get_rank() == 1:
        config = Config(run=Run(dir=root, seed=1))
    if how == "wrong sums" and dist.get_rank() == 1:
        rank_check.sums_right = lambda device: (sums(device), False)[1]
    try:
        return check_ranks(config, torch.device("cpu"))
    except UnfitNodes as error:
        return f"unfit: {error}"
    except UserError as error:
        return f"error: {error}"
    finally:
        rank_check.sums_right = sums


sums = collectives.sums_right


def test_all_ranks_learn_the_nodes(run_ranks: RunRanks, tmp_path: Path) -> None:
    assert run_ranks(2, check, str(tmp_path / "run"), "") == [["node0", "node1"]] * 2
    assert not list((tmp_path / "run").iterdir()), "a token was left behind"


@pytest.mark.parametrize(
    ("ranks", "how", "answer"),
    [
        (3, "other settings", "unfit: node node1: differs in settings from most ranks"),
        (2, "other settings", "error: the ranks have different settings: node0 / node1; start all"),
        (2, "wrong sums", "unfit: node node1: an all-reduce over the ranks fails"),
    ],
)
def test_all_ranks_raise_the_same_error(
    ranks: int, how: str, answer: str, run_ranks: RunRanks, tmp_path: Path
) -> None:
    answers = run_ranks(ranks, check, str(tmp_path / "run"), how)
    assert len(set(answers)) == 1 and answers[0].startswith(answer)


def sums_with_a_broken_rank() -> bool:
    if dist.get_rank() == 1:  # this rank adds other values
        dist.all_reduce(torch.ones(4096, dtype=torch.float64))
        return False
    return collectives.sums_right(torch.device("cpu"))


def test_the_all_reduce_check_detects_a_wrong_sum(run_ranks: RunRanks) -> None:
    assert run_ranks(3, collectives.sums_right, torch.device("cpu")) == [True] * 3
    assert run_ranks(2, sums_with_a_broken_rank) == [False, False]


def test_a_token_is_written_to_the_run_folder(tmp_path: Path) -> None:
    token = leave_token(RunFolder(tmp_path / "runs/new"))
    assert token.exists() and token.parent == tmp_path / "runs/new"


# ------------------------------------------------------------------------------------ cores, ports


@pytest.mark.parametrize(
    ("given", "workers", "words"),
    [
        ("1", 2, "each rank has 1 core(s) and 2 loader workers; request --cpus-per-"),
        ("1", 1, "request --cpus-per-task=2, or set data.workers=0"),
        ("1", 0, ""),
    ],
)
def test_too_few_cores_for_the_loader_give_a_warning(
    given: str,
    workers: int,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", given)
    monkeypatch.setattr(rank_check.log, "propagate", True)
    warn_of_too_few_cores(workers)
    assert (words in caplog.text and "SLOW" in caplog.text) if words else not caplog.text


RANK = """
import os, sys, torch
from dataclasses import replace
from d2v_ds.distributed.world import World
from d2v_ds.distributed.process_group import init, shutdown
import torch.distributed as dist
world = World.from_environment()
init(world, torch.device("cpu"))
values = [None] * world.size
dist.all_gather_object(values, os.environ["SLURM_JOB_ID"])
print(values)
shutdown()
"""


@pytest.fixture
def start_job() -> Iterator[Callable[[str, int], list[subprocess.Popen[str]]]]:
    """start_job(number, port): starts the two ranks of a job the way srun does."""
    started: list[subprocess.Popen[str]] = []

    def start(job: str, port: int) -> list[subprocess.Popen[str]]:
        for rank in range(2):
            environment = {
                **os.environ,
                "SLURM_JOB_ID": job,
                "SLURM_STEP_ID": "0",
                "SLURM_STEP_NUM_TASKS": "2",
                "SLURM_STEP_NODELIST": "localhost",
                "SLURM_PROCID": str(rank),
                "SLURM_LOCALID": str(rank),
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",
            }
            pipe = subprocess.PIPE
            command = [sys.executable, "-c", RANK]
            started.append(
                subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True)
            )
        return started[-2:]

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("taken", [True, False])
def test_two_jobs_with_the_same_port_do_not_interfere(
    taken: bool, start_job: Callable[[str, int], list[subprocess.Popen[str]]]
) -> None:
    """taken: a silent process already listens on the port."""
    with socket.socket() as other:
        other.bind(("", 0))
        port = other.getsockname()[1]
        if taken:
            other.listen()
        else:
            other.close()
        jobs = {job: start_job(job, port) for job in ("77", "78")}
        for job, ranks in jobs.items():
            for rank in ranks:
                output, errors = rank.communicate(timeout=120)
                assert rank.returncode == 0, errors
                assert output.strip() == str([job, job])
