"""The output of `d2v-ds status` in every state of a run."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from d2v_ds.errors import Superseded, UserError
from d2v_ds.run.heartbeat import Heartbeat, beat, duration, heartbeats
from d2v_ds.run.run_folder import Generation, RunFolder, claim_generation
from d2v_ds.run.status import describe, finish, last_row


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    run = RunFolder(tmp_path / "run")
    run.root.mkdir()
    run.config.write_text("run: {steps: 50}\nmodality: {speech: {}}\n")
    return run


def shown(run: RunFolder) -> dict[str, str]:
    """{label: text}."""
    return {line[:13].strip(): line[13:] for line in describe(run.root).splitlines()}


def write_rows(run: RunFolder, *rows: dict[str, Any]) -> None:
    run.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_beat(run: RunFolder, rank: int, age: float = 1.0, **more: Any) -> None:
    now = time.time()
    fields = {"step": 30, "phase": "training", "since": now - 5, "time": now - age, **more}
    beat(run, Heartbeat(rank, f"node{rank}", **fields))


def test_a_run_that_is_starting(run: RunFolder) -> None:
    claim_generation(run, "local")
    assert shown(run) == {
        "run": str(run.root),
        "state": "starting: no heartbeat yet",
        "step": "0 of 50",
        "checkpoint": "none yet",
        "started": "1 time, last as job local, restart 0",
    }


def test_a_run_that_trains(run: RunFolder) -> None:
    claim_generation(run, "7", 0)
    claim_generation(run, "7", 1)
    write_rows(run, {"step": 20, "step_s": 9.0}, {"step": 30, "step_s": 2.0})
    for step in (10, 20, 30):
        run.checkpoint(step).mkdir(parents=True)
    write_beat(run, 0, step=31, busy_seconds=0.25, wait_seconds=0.125)
    write_beat(run, 1, phase="data", since=time.time() - 65, busy_seconds=0.5)
    found = shown(run)
    assert found["state"] == "running: data, for 0:01:05"
    assert found["step"] == "31 of 50" and found["time left"] == "0:00:38 at the current speed"
    assert found["checkpoint"] == "step 30 (of 3 kept)"
    assert found["started"] == "2 times, last as job 7, restart 1"
    assert found["slowest rank"].startswith("1 on node1: 0.500 s per step, excluding waits")


def test_a_run_with_several_modalities_shows_the_loss_of_each(run: RunFolder) -> None:
    run.config.write_text("run: {steps: 50}\nmodality: {speech: {}, text: {}}\n")
    write_rows(run, {"step": 5, "loss/text": 1.5})
    assert shown(run)["modalities"] == "speech, text (loss 1.500)"


@pytest.mark.parametrize(("done", "state"), [(True, "finished"), (False, "stopped")])
def test_a_run_that_ended(run: RunFolder, done: bool, state: str) -> None:
    generation = claim_generation(run, "local")
    finish(run, generation, 30, done=not done, reason="an earlier start")
    finish(run, generation, 50, done=done, reason="SIGTERM")
    assert shown(run)["state"] == f"{state}: SIGTERM"
    assert run.done.exists() == done and run.stopped.exists() != done


def test_only_the_owner_can_end_a_run(run: RunFolder) -> None:
    first = claim_generation(run, "local")
    assert isinstance(first, Generation)
    claim_generation(run, "local")
    with pytest.raises(Superseded):
        finish(run, first, 30, done=True, reason="late")
    assert not run.done.exists()


def test_no_run_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a run folder"):
        describe(tmp_path)


def test_the_last_row_is_the_last_complete_one(run: RunFolder) -> None:
    assert last_row(run.metrics) is None
    write_rows(run, {"step": 1, "long": "x" * 70_000}, {"step": 2})
    with run.metrics.open("a") as file:
        file.write('not json\n{"step": 3')
    assert last_row(run.metrics) == {"step": 2}


def test_heartbeats_are_read_by_rank(run: RunFolder) -> None:
    for rank in (2, 0, 1):
        write_beat(run, rank, step=rank)
    assert [(b.rank, b.step, b.host) for b in heartbeats(run)] == [
        (0, 0, "node0"),
        (1, 1, "node1"),
        (2, 2, "node2"),
    ]
    assert sorted(path.suffix for path in run.heartbeat.iterdir()) == [".json"] * 3


def test_durations() -> None:
    assert [duration(s) for s in (0, 59.9, 3661, 90_000)] == [
        *("0:00:00", "0:00:59"),
        *("1:01:01", "25:00:00"),
    ]
