"""Checkpoints: partitions of any kind, damage, superseded starts, retention, refusals."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from d2v_ds import checkpoint
from d2v_ds.checkpoint import write
from d2v_ds.checkpoint.format import EMA_KINDS, FORMAT
from d2v_ds.engine import Partition
from d2v_ds.errors import Superseded, UserError
from d2v_ds.run.run_folder import Generation, RunFolder, claim_generation
from tests.helpers import checkpoint_pieces as pieces
from tests.helpers.checkpoint_pieces import SHAPES, STATE, STUDENT, Owned, save


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


@pytest.fixture
def generation(run: RunFolder) -> Generation:
    return claim_generation(run, "local")


def restored(opened: checkpoint.Checkpoint) -> Owned:
    state = pieces.empty()
    opened.restore(state.partitions, state.ema, SHAPES)
    return state


@st.composite
def cuts_and_ranks(draw: st.DrawFn) -> tuple[pieces.Cuts, int]:
    ranks = draw(st.integers(1, 4))
    cuts = {
        name: sorted(draw(st.integers(0, pieces.numel(name))) for _ in range(ranks - 1))
        for name in SHAPES
    }
    return cuts, ranks


@settings(max_examples=40, deadline=None)
@given(written=cuts_and_ranks(), read=cuts_and_ranks(), seed=st.integers(0, 99))
def test_a_checkpoint_loads_into_any_other_partitions(
    written: tuple[pieces.Cuts, int], read: tuple[pieces.Cuts, int], seed: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = RunFolder(Path(folder))
        generation = claim_generation(run, "local")
        before = pieces.whole(seed)
        pieces.save_cut(run, generation, 7, before, *written)
        opened = checkpoint.newest_verified(run)
        assert opened is not None
        after = pieces.empty()
        for rank in range(read[1]):
            own = pieces.cut(after, read[0], rank)
            opened.restore(own.partitions, own.ema, SHAPES)
    assert pieces.values_of(after) == pieces.values_of(before)


@pytest.mark.parametrize("cuts", [pieces.even_cuts, pieces.flat_cuts])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_tensors_are_whole(
    run: RunFolder, generation: Generation, cuts: type[pieces.even_cuts], ranks: int
) -> None:
    state = pieces.whole(1)
    opened = checkpoint.open_checkpoint(
        pieces.save_cut(run, generation, 7, state, cuts(ranks), ranks)
    )
    master = opened.tensors("master")
    assert {name: tuple(v.shape) for name, v in master.items()} == {n: SHAPES[n] for n in STUDENT}
    for name, partition in state.partitions.items():
        assert torch.equal(master[name].flatten(), partition.master)
    for kind in EMA_KINDS:
        for name, values in opened.tensors(kind).items():
            assert values.shape == SHAPES[name]
            assert torch.equal(values.flatten(), state.ema[kind][name][1])


def test_save_and_restore_on_one_rank(run: RunFolder, generation: Generation) -> None:
    state = pieces.whole(3)
    path = save(run, generation, 7, state)
    assert path == run.root / "checkpoints" / "00000007"
    assert sorted(p.name for p in path.iterdir()) == [
        "COMPLETE",
        "manifest.json",
        "rank00000.safetensors",
    ]
    opened = checkpoint.newest_verified(run)
    assert opened is not None and opened.step == 7 and opened.state == STATE
    assert opened.versions["torch"] == torch.__version__
    assert pieces.values_of(restored(opened)) == pieces.values_of(state)


def test_manifest_is_plain_json_without_absolute_paths(
    run: RunFolder, generation: Generation
) -> None:
    text = (save(run, generation, 7, pieces.whole(3)) / "manifest.json").read_text()
    assert json.loads(text)["format"] == FORMAT
    assert str(run.root) not in text


def test_shared_adam_step_is_written_once(run: RunFolder, generation: Generation) -> None:
    state, shared = pieces.whole(0), torch.tensor(5.0)
    state.partitions = {
        name: Partition(0, s.master, s.exp_avg, s.exp_avg_sq, shared)
        for name, s in state.partitions.items()
    }
    opened = checkpoint.open_checkpoint(save(run, generation, 7, state))
    shared.fill_(0)
    opened.restore(state.partitions, state.ema, SHAPES)
    assert shared == 5


def test_shared_adam_step_must_agree(run: RunFolder, generation: Generation) -> None:
    opened = checkpoint.open_checkpoint(save(run, generation, 7, pieces.whole(0)))
    state, shared = pieces.empty(), torch.tensor(5.0)
    partitions = {
        n: Partition(0, s.master, s.exp_avg, s.exp_avg_sq, shared)
        for n, s in state.partitions.items()
    }
    with pytest.raises(AssertionError, match="share an Adam step"):
        opened.restore(partitions, state.ema, SHAPES)


# --------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            {"student.trunk.bias": (9,)},
            "checkpoint 7 was written with student.trunk.bias of shape [7], but this run has [9]. "
            "Resuming needs the same model; choose another run.dir.",
        ),
        (
            {"student.new": (2,), "student.trunk.weight": (5, 6)},
            "checkpoint 7 was written with student.trunk.weight of shape [6, 5], but this run "
            "has [5, 6] (2 parameters differ in total). Resuming needs the same model; choose "
            "another run.dir.",
        ),
        (
            {"student.new": (2,)},
            "checkpoint 7 was written without student.new, which this run has. "
            "Resuming needs the same model; choose another run.dir.",
        ),
        (
            {"student.scale": None},
            "checkpoint 7 was written with student.scale, which this run lacks. "
            "Resuming needs the same model; choose another run.dir.",
        ),
    ],
)
def test_restore_refuses_another_model(
    run: RunFolder,
    generation: Generation,
    change: dict[str, tuple[int, ...] | None],
    expected: str,
) -> None:
    opened = checkpoint.open_checkpoint(save(run, generation, 7, pieces.whole(0)))
    shapes = {name: shape for name, shape in (SHAPES | change).items() if shape is not None}
    state = pieces.whole(1)
    before = pieces.values_of(state)
    with pytest.raises(UserError) as caught:
        opened.restore(state.partitions, state.ema, shapes)
    assert str(caught.value) == expected
    assert pieces.values_of(state) == before


def test_a_gap_is_never_published(run: RunFolder, generation: Generation) -> None:
    state = pieces.whole(0)
    averages = state.ema["ema"]
    averages["teacher.trunk.bias"] = (0, averages["teacher.trunk.bias"][1][:-1])
    with pytest.raises(AssertionError, match=r"ema of teacher.trunk.bias: the pieces end at 6"):
        save(run, generation, 7, state)
    del state.ema["ema_compensation"]["teacher.trunk.bias"]
    averages["teacher.trunk.bias"] = (0, torch.zeros(7))
    with pytest.raises(AssertionError, match="an EMA lacks its compensation"):
        save(run, generation, 7, state)
    del averages["teacher.trunk.bias"]
    with pytest.raises(AssertionError, match=r"no rank owns teacher.trunk.bias"):
        save(run, generation, 7, state)
    assert list(run.checkpoints.iterdir()) == []


def test_a_full_disk_is_detected_before_writing(
    run: RunFolder, generation: Generation, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")(10**9, 10**9 - 5 * 10**5, 5 * 10**5)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match=r"needs .* GB, but only 0.0005 GB are free; .* save.keep"):
        save(run, generation, 7, pieces.whole(0))
    assert list(run.checkpoints.iterdir()) == []


def test_a_failing_write_leaves_nothing(
    run: RunFolder, generation: Generation, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(run, generation, 6, pieces.whole(0))
    before = pieces.tree(run.root)
    before.pop("checkpoints")  # its modification time changes with the temporary folder

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("d2v_ds.checkpoint.write.save_file", full)
    with pytest.raises(
        checkpoint.CannotSave, match=r"rank 0 cannot write checkpoint \d: .*No space left"
    ):
        save(run, generation, 7, pieces.whole(0))
    after = pieces.tree(run.root)
    after.pop("checkpoints")
    assert after == before


@pytest.mark.parametrize("present", ["COMPLETE", "manifest.json"])
def test_open_names_what_is_missing(run: RunFolder, generation: Generation, present: str) -> None:
    path = save(run, generation, 7, pieces.whole(0))
    (path / present).unlink()
    with pytest.raises(checkpoint.DamagedCheckpoint, match=f"{present}: missing"):
        checkpoint.open_checkpoint(path)
    with pytest.raises(UserError, match="nowhere: no such checkpoint"):
        checkpoint.open_checkpoint(run.root / "nowhere")


def test_an_unknown_format_is_an_error_and_is_not_skipped(
    run: RunFolder, generation: Generation, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(run, generation, 6, pieces.whole(0))
    monkeypatch.setattr("d2v_ds.checkpoint.write.FORMAT", 1)
    save(run, generation, 7, pieces.whole(0))
    with pytest.raises(UserError, match=r"00000007: has checkpoint format 1, but this d2v_ds"):
        checkpoint.newest_verified(run)


# ----------------------------------------------------------------------------------- damage


def shorten(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("file", "harm", "reason"),
    [
        ("rank00001.safetensors", Path.unlink, "missing"),
        ("rank00000.safetensors", shorten, "were written"),
        ("rank00001.safetensors", flip_bit, "SHA-256"),
        ("manifest.json", flip_bit, "SHA-256"),
        ("manifest.json", Path.unlink, "missing"),
        ("COMPLETE", Path.unlink, "missing"),
        ("COMPLETE", flip_bit, "SHA-256"),
    ],
)
def test_a_damaged_checkpoint_is_skipped(
    run: RunFolder,
    generation: Generation,
    caplog: pytest.LogCaptureFixture,
    file: str,
    harm: type[shorten],
    reason: str,
) -> None:
    older = pieces.whole(1)
    pieces.save_cut(run, generation, 5, older, pieces.even_cuts(2), 2)
    newer = pieces.save_cut(run, generation, 10, pieces.whole(2), pieces.flat_cuts(2), 2)
    harm(newer / file)
    with caplog.at_level(logging.WARNING):
        opened = checkpoint.newest_verified(run)
    assert opened is not None and opened.step == 5
    assert pieces.values_of(restored(opened)) == pieces.values_of(older)
    named = "manifest.json" if file == "COMPLETE" and harm is flip_bit else file
    (warning,) = caplog.messages
    assert "checkpoint 10 is skipped" in warning
    assert str(newer / named) in warning and reason in warning


def test_no_checkpoint_at_all(run: RunFolder) -> None:
    assert checkpoint.newest_verified(run) is None


def test_no_valid_checkpoint_is_an_error(run: RunFolder, generation: Generation) -> None:
    flip_bit(save(run, generation, 7, pieces.whole(0)) / "rank00000.safetensors")
    with pytest.raises(UserError, match="none of the 1 checkpoints is valid"):
        checkpoint.newest_verified(run)


def test_a_damaged_checkpoint_is_replaced_by_a_save_of_its_step(
    run: RunFolder, generation: Generation
) -> None:
    save(run, generation, 5, pieces.whole(1), keep=1)
    flip_bit(save(run, generation, 10, pieces.whole(2)) / "rank00000.safetensors")
    save(run, generation, 8, pieces.whole(3), keep=1)
    assert run.steps() == [8, 10]  # the damaged one does not count as newer than step 8
    state = pieces.whole(4)
    save(run, generation, 10, state, keep=1)
    assert run.steps() == [10]
    opened = checkpoint.newest_verified(run)
    assert opened is not None and pieces.values_of(restored(opened)) == pieces.values_of(state)


# ------------------------------------------------------------ retention and superseded starts


def test_the_last_checkpoints_are_kept(run: RunFolder, generation: Generation) -> None:
    for step in (2, 9, 10, 11, 100):
        save(run, generation, step, pieces.whole(step), keep=3)
    assert run.steps() == [10, 11, 100]
    assert {p.name for p in run.checkpoints.iterdir()} == {"00000010", "00000011", "00000100"}


def test_a_superseded_start_changes_nothing(run: RunFolder, generation: Generation) -> None:
    save(run, generation, 5, pieces.whole(0))
    newer = claim_generation(run, "job", 0)
    before = pieces.tree(run.root)
    with pytest.raises(Superseded, match=r"owned by generation 2 \(job job, restart 0"):
        save(run, generation, 10, pieces.whole(1), keep=1)
    assert pieces.tree(run.root) == before
    save(run, newer, 10, pieces.whole(2), keep=1)
    assert run.steps() == [10]


def test_a_start_superseded_during_a_save_publishes_nothing(
    run: RunFolder, generation: Generation, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(run, generation, 5, pieces.whole(0))
    write_pieces = write.write_pieces

    def write_and_lose(*arguments: object) -> object:
        files = write_pieces(*arguments)  # type: ignore[arg-type]
        claim_generation(run, "job", 0)
        return files

    monkeypatch.setattr(write, "write_pieces", write_and_lose)
    with pytest.raises(Superseded):
        save(run, generation, 5, pieces.whole(1), keep=1)
    assert [p.name for p in run.checkpoints.iterdir()] == ["00000005"]
    opened = checkpoint.newest_verified(run)
    assert opened is not None
    assert pieces.values_of(restored(opened)) == pieces.values_of(pieces.whole(0))


def test_two_starts_never_write_into_one_folder(
    run: RunFolder, generation: Generation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A start pauses during a save and continues while its successor saves the same step. Its files
    must not end up in the successor's checkpoint."""
    write_pieces = write.write_pieces
    outer: list[tuple[Any, ...]] = []

    def interleaved(*arguments: Any) -> Any:
        if not outer:  # the old start, paused while the new one saves
            outer.append(arguments)
            save(run, claim_generation(run, "job", 0), 7, pieces.whole(2))
            return write_pieces(*arguments)
        files = write_pieces(*arguments)
        outer[0][0].mkdir(exist_ok=True)
        write_pieces(*outer[0])
        return files

    monkeypatch.setattr(write, "write_pieces", interleaved)
    with pytest.raises(Superseded):
        save(run, generation, 7, pieces.whole(1))
    opened = checkpoint.newest_verified(run)
    assert opened is not None
    assert pieces.values_of(restored(opened)) == pieces.values_of(pieces.whole(2))


def test_clean_removes_leftovers_and_gives_a_name_back(
    run: RunFolder, generation: Generation
) -> None:
    path = save(run, generation, 7, pieces.whole(0))
    os.rename(path, run.checkpoints / ".00000007.replaced")
    for name in (".00000008.1.tmp", ".00000003.removed"):
        (run.checkpoints / name).mkdir()
    checkpoint.clean(run)
    assert [p.name for p in run.checkpoints.iterdir()] == ["00000007"]
    assert checkpoint.newest_verified(run) is not None
