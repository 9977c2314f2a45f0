"""The watchdog with processes that really hang: which rank it names, stacks, and exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from d2v_ds.run.heartbeat import Heartbeat, heartbeats
from d2v_ds.run.heartbeat import beat as write_beat
from d2v_ds.run.run_folder import RunFolder, claim_generation
from d2v_ds.run.status import describe
from d2v_ds.run.watchdog import HUNG, Watchdog, describe_hang

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
    assert hung.startswith("hanging: rank 1 on node1 has been in 'data' after step 7 for 0:00:0")
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


def beat(rank: int, step: int, phase: str, seconds: float) -> Heartbeat:
    return Heartbeat(rank, f"node{rank}", step, phase, 0.0, 0.0, phase_seconds=seconds)


@pytest.mark.parametrize(
    ("beats", "silent", "words"),
    [
        (
            [beat(0, 5, "training", 89.0), beat(1, 5, "data", 90.0), beat(2, 5, "training", 88.9)],
            {},
            "rank 1 on node1 has been in 'data' after step 5 for 0:01:30, longer than any other",
        ),
        (
            [beat(0, 5, "training", 89.0), beat(2, 4, "saving", 88.0)],
            {},
            "no heartbeat was ever received from rank 1",
        ),
        (
            [beat(0, 5, "data", 99.0), beat(1, 5, "data", 99.0), beat(2, 4, "data", 9.0)],
            {2: 20.0},
            "rank 2 on node2 has been silent for more than 0:00:20, last in 'data' after step 4",
        ),
        (
            [beat(0, 5, "data", 99.0), beat(1, 4, "data", 91.0), beat(2, 5, "data", 99.0)],
            {},
            "rank 1 on node1",
        ),
    ],
)
def test_verdict(beats: list[Heartbeat], silent: dict[int, float], words: str) -> None:
    assert words in describe_hang(beats, 3, silent)


def test_a_job_that_was_suspended_is_not_hanging(run: RunFolder, start: Start) -> None:
    """SIGSTOP to all ranks, for longer than the limit, as `scontrol suspend` does."""
    ranks = [start(0, "ends well"), start(1, "ends well")]
    wait_for(lambda: len(heartbeats(run)) == 2)
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for rank in ranks:
            rank.send_signal(number)
        time.sleep(2.5 if number == signal.SIGSTOP else 0)
    outputs = [rank.communicate(timeout=30)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    assert not (logs(run) / "hung").exists()


def test_the_clock_may_be_set(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """One hour forward, while a rank trains and another one watches it."""
    with Watchdog(0, 1, limit=20.0) as watchdog:
        watchdog.start(run, claim_generation(run, "77", 1))
        monkeypatch.setattr("d2v_ds.run.watchdog.time.time", lambda: 4e9)
        watchdog.mark("training", 1)
        assert not watchdog._hangs() and watchdog._phase_seconds() < 20
    [one] = heartbeats(run)
    assert one.phase_seconds < 20 and one.generation == 2


def test_the_mark_of_an_earlier_start_ends_no_later_one(run: RunFolder) -> None:
    mark = run.root / "logs/77.0/hung"
    mark.parent.mkdir(parents=True)
    mark.write_text("hanging: rank 0\n")
    generation = claim_generation(run, "77", 0)
    with Watchdog(0, 1, limit=20.0) as watchdog:
        watchdog.start(run, generation)
        watchdog._look()
    assert (mark.parent / f"hung.before.{generation.number}").read_text() == "hanging: rank 0\n"


def test_heartbeats_on_a_full_disk(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The last one is overwritten in place; if that fails as well, training goes on."""
    write_beat(run, Heartbeat(0, "node", 1, "training", 0.0, 0.0))

    def full(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    write_beat(run, Heartbeat(0, "node", 2, "data", 0.0, 0.0))
    assert [one.step for one in heartbeats(run)] == [2]
    with Watchdog(1, 2, limit=20.0) as watchdog:  # has no heartbeat yet
        watchdog.start(run, claim_generation(run, "77", 1))
        watchdog._look()
        watchdog._look()
        monkeypatch.undo()
        watchdog._look()
    assert [one.rank for one in heartbeats(run)] == [1]


def test_status_distinguishes_silent_from_running(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("d2v_ds.run.status.OBSERVED", 0.3)
    run.config.write_text("run: {steps: 50}\nmodality: {speech: {}}\n")
    run.metrics.write_text(json.dumps({"step": 30, "step_s": 2.0}) + "\n")
    now = time.time()
    for rank, age in ((0, 1.0), (1, 90.0)):
        write_beat(run, Heartbeat(rank, f"node{rank}", 30, "training", now - 95, now - age))
    shown = describe(run.root)
    assert "state        silent: rank 1 on node1 for 0:01:3" in shown
    assert "step         30 of 50" in shown and "time left    0:00:40" in shown
    (run.heartbeat / "rank00001.json").unlink()
    assert "state        running: training, for 0:01:35" in describe(run.root)


def test_a_node_whose_clock_is_wrong_is_not_silent(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("d2v_ds.run.status.OBSERVED", 30.0)  # ends as soon as the file changes
    run.config.write_text("run: {steps: 50}\nmodality: {speech: {}}\n")
    old = Heartbeat(0, "node0", 30, "data", 0.0, 100.0, generation=1, count=1, phase_seconds=3.0)
    write_beat(run, old)
    later = threading.Timer(0.2, write_beat, (run, replace(old, time=101.0, count=2)))
    later.start()
    assert "state        running: data, for 0:0" in describe(run.root)
    later.join()
