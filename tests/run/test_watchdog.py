"""The watchdog with processes that really hang: which rank it names, stacks, and exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from d2v_ds.run.heartbeat import Heartbeat, heartbeats
from d2v_ds.run.run_folder import RunFolder, claim_generation
from d2v_ds.run.status import describe
from d2v_ds.run.watchdog import HUNG, describe_hang

RANK = """
import logging, os, sys, time
from pathlib import Path
from d2v_ds.run.run_folder import RunFolder, read_generation
from d2v_ds.run.watchdog import Watchdog

def stuck_in_the_data_loader(how):
    if how == "holding the interpreter":
        import re
        re.match("(a+)+$", "a" * 40 + "b")  # for hours, and lets no other thread run
    while True:
        time.sleep(0.01)

root, rank, how = sys.argv[1:]
run = RunFolder(Path(root))
with Watchdog(int(rank), 2, limit=1.5) as watchdog:
    watchdog.start(run, read_generation(run))
    watchdog.mark("data", 7)
    if how.startswith(("hangs", "holding")):
        stuck_in_the_data_loader(how)
    for _ in range(10):
        time.sleep(0.1)
        watchdog.mark("training", 7)
    if how == "waits":
        time.sleep(60)  # for the other, as a collective does
"""


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    run = RunFolder(tmp_path / "run")
    claim_generation(run, "77", 0)
    return run


Start = Callable[[int, str], "subprocess.Popen[str]"]


@pytest.fixture
def start(run: RunFolder) -> Iterator[Start]:
    """start(rank, how): starts a process with the behaviour `how`."""
    started = []

    def start(rank: int, how: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", RANK, str(run.root), str(rank), how]
        environment = {**os.environ, "SLURMD_NODENAME": f"node{rank}"}
        started.append(
            subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        )
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def logs(run: RunFolder) -> Path:
    return run.root / "logs/77.0"


def wait_for(reached: Callable[[], object], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_hanging_rank_is_named_and_all_ranks_write_stacks_and_exit(
    run: RunFolder, start: Start
) -> None:
    ranks = [start(0, "waits"), start(1, "hangs")]
    outputs = [rank.communicate(timeout=30)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [HUNG, HUNG]
    hung = (logs(run) / "hung").read_text()
    assert hung.startswith("hanging: rank 1 on node1 has been in 'data' after step 7 for 0:00:01")
    assert sum(hung.strip() in output for output in outputs) == 1, "only one rank must report it"
    assert "stuck_in_the_data_loader" in (logs(run) / "stacks-rank00001.txt").read_text()
    assert "<module>" in (logs(run) / "stacks-rank00000.txt").read_text()


def test_a_stopped_process_is_named_by_the_others(run: RunFolder, start: Start) -> None:
    ranks = [start(0, "waits"), start(1, "waits")]
    wait_for(lambda: len(heartbeats(run)) == 2)
    ranks[1].send_signal(signal.SIGSTOP)
    ranks[0].communicate(timeout=30)
    assert ranks[0].returncode == HUNG
    assert "hanging: rank 1 on node1 has been silent for" in (logs(run) / "hung").read_text()
    assert (logs(run) / "stacks-rank00000.txt").stat().st_size


def test_a_rank_that_holds_the_interpreter_still_writes_its_stacks(
    run: RunFolder, start: Start
) -> None:
    start(0, "holding the interpreter")
    stacks = logs(run) / "stacks-rank00000.txt"
    wait_for(lambda: stacks.exists() and "stuck_in_the_data_loader" in stacks.read_text())


def test_the_batch_script_can_request_stacks(run: RunFolder, start: Start) -> None:
    rank = start(0, "waits")
    wait_for(lambda: heartbeats(run))
    (logs(run) / "hung").write_text("silent: rank 1 on node1\n")
    rank.communicate(timeout=20)
    assert rank.returncode == HUNG
    assert (logs(run) / "stacks-rank00000.txt").stat().st_size


def test_a_superseded_rank_exits_with_an_error(run: RunFolder, start: Start) -> None:
    rank = start(0, "waits")
    wait_for(lambda: heartbeats(run))
    claim_generation(run, "77", 1)
    output = rank.communicate(timeout=20)[1]
    assert rank.returncode == 1
    assert "is owned by generation 2 (job 77, restart 1" in output


def test_a_run_that_makes_progress_is_not_stopped(run: RunFolder, start: Start) -> None:
    rank = start(0, "ends well")
    rank.communicate(timeout=20)
    assert rank.returncode == 0
    assert not list(logs(run).iterdir()), "stacks were written"
    [beat] = heartbeats(run)
    assert (beat.rank, beat.host, beat.step, beat.phase) == (0, "node0", 7, "training")


def beat(rank: int, step: int, phase: str, since: float, time: float = 100.0) -> Heartbeat:
    return Heartbeat(rank, f"node{rank}", step, phase, since, time)


@pytest.mark.parametrize(
    ("beats", "words"),
    [
        (
            [beat(0, 5, "training", 11.0), beat(1, 5, "data", 10.0), beat(2, 5, "training", 11.1)],
            "rank 1 on node1 has been in 'data' after step 5 for 0:01:30, longer than any other",
        ),
        (
            [beat(0, 5, "training", 11.0), beat(2, 4, "saving", 12.0)],
            "no heartbeat was ever received from rank 1",
        ),
        (
            [beat(0, 5, "data", 1.0), beat(1, 5, "data", 1.0), beat(2, 4, "data", 1.0, time=40.0)],
            "rank 2 on node2 has been silent for 0:01:00, last in 'data' after step 4",
        ),
        (
            [beat(0, 5, "data", 1.0), beat(1, 4, "data", 9.0), beat(2, 5, "data", 1.0)],
            "rank 1 on node1",
        ),
    ],
)
def test_verdict(beats: list[Heartbeat], words: str) -> None:
    assert words in describe_hang(beats, 3, 100.0, 5.0)


def test_status_distinguishes_silent_from_running(run: RunFolder) -> None:
    run.config.write_text("run: {steps: 50}\nmodality: {speech: {}}\n")
    run.metrics.write_text(json.dumps({"step": 30, "step_s": 2.0}) + "\n")
    now = time.time()
    for rank, age in ((0, 1.0), (1, 90.0)):
        run.heartbeat.mkdir(exist_ok=True)
        path = run.heartbeat / f"rank{rank:05d}.json"
        path.write_text(json.dumps(vars(beat(rank, 30, "training", now - 95, now - age))))
    shown = describe(run.root)
    assert "state        silent: rank 1 on node1 for 0:01:3" in shown
    assert "step         30 of 50" in shown and "time left    0:00:40" in shown
    (run.heartbeat / "rank00001.json").unlink()
    assert "state        running: training, for 0:01:35" in describe(run.root)
