"""Saving in the background: when training waits, when a checkpoint appears, which are kept."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from d2v_ds import checkpoint
from d2v_ds.checkpoint import CannotSave, Saver, write
from d2v_ds.errors import Superseded
from d2v_ds.run.run_folder import Generation, RunFolder, claim_generation
from tests.helpers import checkpoint_pieces as pieces


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


@pytest.fixture
def generation(run: RunFolder) -> Generation:
    return claim_generation(run, "local")


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """A disk that blocks writes until the event is set."""
    event = threading.Event()
    save_file = write.save_file

    def wait(*arguments: Any) -> None:
        assert event.wait(30)
        save_file(*arguments)

    monkeypatch.setattr(write, "save_file", wait)
    return event


def poll_until(saver: Saver, run: RunFolder, steps: list[int]) -> None:
    deadline = time.monotonic() + 30
    while run.steps() != steps:
        assert time.monotonic() < deadline
        saver.poll()
        time.sleep(0.01)


def values_at(run: RunFolder, step: int) -> dict[str, Any]:
    state = pieces.empty()
    opened = checkpoint.open_checkpoint(run.checkpoint(step))
    opened.verify()
    opened.restore(state.partitions, state.ema, pieces.SHAPES)
    return pieces.values_of(state)


def test_training_continues_while_the_disk_is_slow(
    run: RunFolder, generation: Generation, disk: threading.Event
) -> None:
    saver = Saver(run, generation, keep=3)
    state = pieces.whole(1)
    before = pieces.values_of(state)
    pieces.begin(saver, 5, state)
    for partition in state.partitions.values():  # the next step changes everything
        partition.master.add_(1)
        partition.adam_step.add_(1)
    for of_kind in state.ema.values():
        for _, values in of_kind.values():
            values.add_(1)
    saver.poll()
    assert run.steps() == []
    disk.set()
    poll_until(saver, run, [5])
    assert values_at(run, 5) == before


def test_successive_saves_store_their_own_values(run: RunFolder, generation: Generation) -> None:
    saver = Saver(run, generation, keep=3)
    for step in (1, 2):
        pieces.begin(saver, step, pieces.whole(step))
        saver.finish()
    assert [values_at(run, step) for step in (1, 2)] == [
        pieces.values_of(pieces.whole(step)) for step in (1, 2)
    ]


def test_the_next_save_waits_for_the_last(
    run: RunFolder, generation: Generation, disk: threading.Event
) -> None:
    saver = Saver(run, generation, keep=3)
    pieces.begin(saver, 5, pieces.whole(1))
    threading.Timer(0.2, disk.set).start()
    pieces.begin(saver, 6, pieces.whole(2))
    assert run.steps() == [5]
    saver.finish()
    assert run.steps() == [5, 6]
    saver.finish()  # no save is in progress any more
    saver.poll()


def test_a_failing_write_is_raised_at_the_next_boundary(
    run: RunFolder, generation: Generation, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver = Saver(run, generation, keep=1)
    pieces.begin(saver, 5, pieces.whole(1))
    saver.finish()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(write, "save_file", full)
    pieces.begin(saver, 6, pieces.whole(2))
    with pytest.raises(CannotSave, match=r"rank 0 cannot write checkpoint \d: .*No space left"):
        poll_until(saver, run, [6])
    assert [path.name for path in run.checkpoints.iterdir()] == ["00000005"]
    assert values_at(run, 5) == pieces.values_of(pieces.whole(1))


def test_a_start_superseded_while_writing_publishes_nothing(
    run: RunFolder, generation: Generation, disk: threading.Event
) -> None:
    saver = Saver(run, generation, keep=1)
    pieces.begin(saver, 5, pieces.whole(1))
    claim_generation(run, "job", 0)
    disk.set()
    with pytest.raises(Superseded):
        saver.finish()
    assert list(run.checkpoints.iterdir()) == []


def test_a_start_whose_files_a_newer_one_removed_reports_the_newer_one(
    run: RunFolder, generation: Generation, disk: threading.Event
) -> None:
    saver = Saver(run, generation, keep=1)
    pieces.begin(saver, 5, pieces.whole(1))
    claim_generation(run, "job", 0)
    checkpoint.clean(run)  # as the newer start does before it trains
    disk.set()
    with pytest.raises(Superseded, match="is owned by generation 2"):
        saver.finish()


def test_every_nth_checkpoint_is_kept_permanently(run: RunFolder, generation: Generation) -> None:
    for step in range(2, 15, 2):
        pieces.save(run, generation, step, pieces.whole(step), keep=2, keep_every=4)
    assert run.steps() == [4, 8, 12, 14]
