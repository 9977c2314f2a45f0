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


# ------------------------------------------------------------------------- errors while saving


def interrupted(run: RunFolder, generation: Generation, step: int) -> Path:
    """A save whose files are complete, and which nobody has published."""
    saver = Saver(run, generation, keep=3)
    pieces.begin(saver, step, pieces.whole(step))
    pending = saver._pending
    assert pending is not None
    pending.written.result(30)
    return pending.aside


def test_a_failed_save_is_tried_again(
    run: RunFolder, generation: Generation, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver = Saver(run, generation, keep=3)
    save_file = write.save_file

    def full(tensors: Any, path: Path) -> None:
        save_file(tensors, path)  # a part of it
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(write, "save_file", full)
    pieces.begin(saver, 5, pieces.whole(1))
    with pytest.raises(CannotSave, match="checkpoints: rank 0 cannot write checkpoint 5: "):
        saver.finish()
    assert list(run.checkpoints.iterdir()) == [], "it would fill the disk"
    monkeypatch.undo()
    pieces.begin(saver, 6, pieces.whole(2))
    saver.finish()
    assert run.steps() == [6] and saver.saved == 6


def test_an_error_elsewhere_does_not_lose_a_complete_checkpoint(
    run: RunFolder, generation: Generation, disk: threading.Event
) -> None:
    saver = Saver(run, generation, keep=3)
    pieces.begin(saver, 5, pieces.whole(1))
    threading.Timer(0.2, disk.set).start()
    saver.rescue(30)
    assert values_at(run, 5) == pieces.values_of(pieces.whole(1))
    assert {path.name for path in run.checkpoint(5).iterdir()} == {
        "rank00000.safetensors", "manifest.json", "COMPLETE",
    }  # fmt: skip
    saver.rescue(30)  # nothing is left to do


def test_a_rescue_ends_in_time(
    run: RunFolder, generation: Generation, disk: threading.Event
) -> None:
    saver = Saver(run, generation, keep=3)
    pieces.begin(saver, 5, pieces.whole(1))
    saver.rescue(0.1)
    assert run.steps() == []
    disk.set()


def test_a_start_publishes_what_the_last_one_could_not(
    run: RunFolder, generation: Generation
) -> None:
    interrupted(run, generation, 5)
    interrupted(run, generation, 7)
    interrupted(run, generation, 6)
    checkpoint.clean(run, 5)
    assert run.steps() == [7] and values_at(run, 7) == pieces.values_of(pieces.whole(7))
    assert [path.name for path in run.checkpoints.iterdir()] == ["00000007"]


@pytest.mark.parametrize("name", ["plan.json", "rank00000.json", "rank00000.safetensors"])
@pytest.mark.parametrize("harm", ["missing", "changed", "empty"])
def test_damaged_remains_are_never_published(
    name: str, harm: str, run: RunFolder, generation: Generation
) -> None:
    path = interrupted(run, generation, 5) / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.unlink()
    if harm != "missing":
        path.write_bytes(content if harm == "changed" else b"")
    checkpoint.clean(run)
    assert list(run.checkpoints.iterdir()) == []


def test_other_files_among_the_checkpoints_stay(run: RunFolder, generation: Generation) -> None:
    pieces.save(run, generation, 5, pieces.whole(1), keep=1)
    for name in (".DS_Store", "notes of today", "00000009", ".00000008.tmp"):
        (run.checkpoints / name).write_text("kept")
    (run.checkpoints / "00000030").mkdir()
    (run.checkpoints / "00000031").symlink_to("nowhere")
    checkpoint.clean(run)
    found = checkpoint.newest_verified(run)
    assert found is not None and found.step == 5
    pieces.save(run, generation, 9, pieces.whole(2), keep=3)
    assert run.steps() == [5, 9, 30]
    kept = (".DS_Store", "notes of today", "00000009.stray", ".00000008.tmp")
    assert all((run.checkpoints / name).read_text() == "kept" for name in kept)


def test_only_empty_folders_are_no_checkpoints(run: RunFolder) -> None:
    run.checkpoint(30).mkdir(parents=True)
    assert checkpoint.newest_verified(run) is None
