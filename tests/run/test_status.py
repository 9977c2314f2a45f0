"""The output of `d2v-ds status` in every state of a run."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from d2v_ds.errors import Superseded, UserError
from d2v_ds.records import last_row
from d2v_ds.run.heartbeat import Heartbeat, beat, duration, heartbeats
from d2v_ds.run.run_folder import (
    Generation,
    RunFolder,
    claim_generation,
    refuse_superseded,
)
from d2v_ds.run.status import describe, finish
from d2v_ds.run.watchdog import Watchdog


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


DAMAGE = (
    b"",
    b"\0" * 5000,
    b"\xff\xfe",
    b"[]",
    b"{}",
    b"null",
    b'{"step": "x", "reason": []}',
    b"[" * 9999,
)


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_are_shown_as_far_as_possible(run: RunFolder, damage: bytes) -> None:
    claim_generation(run, "7", 0)
    write_rows(run, {"step": 20, "step_s": 9.0})
    write_beat(run, 0, step=31)
    (run.heartbeat / "rank00001.json").write_bytes(damage)
    with run.metrics.open("ab") as file:
        file.write(damage + b"\n")
    assert shown(run)["step"] == "31 of 50" and shown(run)["state"].startswith("running")
    run.generation.write_bytes(damage)
    assert "GENERATION is damaged" in shown(run)["trouble"]
    run.config.write_bytes(damage)
    assert shown(run)["step"] == "31 of an unknown number"
    assert "config.yaml is damaged" in describe(run.root)
    run.done.write_bytes(damage)
    assert shown(run)["state"].startswith("finished: ")


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_generation_is_written_again(run: RunFolder, damage: bytes) -> None:
    first = claim_generation(run, "local")
    run.generation.write_bytes(damage)
    refuse_superseded(run, first)  # nobody has taken over
    write_beat(run, 0, generation=4)
    second = claim_generation(run, "local")
    assert second.number == 5, "it must be higher than that of every earlier start"
    with pytest.raises(Superseded, match="is owned by generation 5"):
        refuse_superseded(run, first)


def test_stray_entries_among_the_checkpoints(run: RunFolder) -> None:
    run.checkpoint(10).mkdir(parents=True)
    run.checkpoint(20).write_text("a file")
    run.checkpoint(30).symlink_to("nowhere")
    for name in ("000000040", "notes of today", "٠٠٠٠٠٠٥٠", ".00000060.1.tmp", "9" * 40):
        (run.checkpoints / name).mkdir()
    assert run.steps() == [10]


def test_ranks_of_earlier_starts_are_not_silent(run: RunFolder) -> None:
    """A run that resumed on fewer ranks."""
    claim_generation(run, "7", 0)
    for rank in range(4):
        write_beat(run, rank, age=500.0, generation=1)
    claim_generation(run, "7", 1)
    write_beat(run, 0, generation=2)
    assert shown(run)["state"].startswith("running: training")
    write_beat(run, 3, age=500.0, generation=1)  # written by a process that was cut off
    assert shown(run)["state"].startswith("running: training")


def test_an_error_that_ended_the_run_is_shown(run: RunFolder) -> None:
    generation = claim_generation(run, "7", 0)
    with Watchdog(0, 1) as watchdog:
        watchdog.start(run, generation)
        watchdog.mark("data", 31)
        watchdog.ended("3 of the first 100 samples cannot be used")
    found = shown(run)
    assert found["state"].startswith("ended with an error: rank 0 on ")
    assert found["state"].endswith(": 3 of the first 100 samples cannot be used")


def test_a_full_disk_and_lost_rows_are_shown(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_beat(run, 0, lost=12)
    monkeypatch.setattr("d2v_ds.run.status.MIN_FREE", 1e18)
    text = describe(run.root)
    assert "12 rows of metrics could not be written" in text and "MB free, so rows" in text


def test_a_marker_that_cannot_be_written(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    generation = claim_generation(run, "local")

    def full(path: Path, data: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("d2v_ds.run.status.write_atomically", full)
    with pytest.raises(UserError, match=r"DONE: cannot be written .* saved at step 50; free some"):
        finish(run, generation, 50, done=True, reason="all steps")
