"""Checkpoints of real processes: kills at every change of the disk, and errors on single ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from d2v_ds import checkpoint
from d2v_ds.run.run_folder import Generation, RunFolder, claim_generation
from tests.helpers import checkpoint_pieces as pieces
from tests.helpers import checkpoint_ranks as ranks

SIGKILL = -9


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


@pytest.fixture
def generation(run: RunFolder) -> Generation:
    return claim_generation(run, "4711", 0)


def assert_run_goes_on(run: RunFolder, allowed: dict[int, tuple[int, ...]]) -> None:
    """Asserts that a new start removes leftovers, finds a valid checkpoint with the values of an
    allowed seed, and can save again. allowed: {step: seeds}."""
    generation = claim_generation(run, "4711")
    checkpoint.clean(run)
    leftovers = [path.name for path in run.checkpoints.iterdir() if path.name.startswith(".")]
    assert leftovers == []
    opened = checkpoint.newest_verified(run)
    assert opened is not None and opened.step in allowed
    state = pieces.empty()
    opened.restore(state.partitions, state.ema, pieces.SHAPES)
    assert pieces.values_of(state) in [
        pieces.values_of(pieces.whole(seed)) for seed in allowed[opened.step]
    ]
    ranks.save(0, 1, run.root, generation, 99, 9, 1)
    assert run.steps() == [99]


def killed_everywhere(tmp_path: Path, step: int, world: int, victim: int) -> int:
    """Saves `step` after a checkpoint of step 5, killed at each boundary in turn. Returns the
    number of boundaries in a save."""
    boundary = 0
    while True:
        folder = tmp_path / f"{victim}.{boundary}"
        run = RunFolder(folder / "run")
        generation = claim_generation(run, "4711", 0)
        pieces.save_cut(run, generation, 5, pieces.whole(1), pieces.flat_cuts(2), 2)
        arguments = (victim, boundary, world, run.root, generation, step, 2, 1)
        codes = ranks.finish(ranks.start(world, folder, ranks.save_and_die, *arguments))
        assert None not in codes, f"boundary {boundary}: a rank hung"
        allowed = {5: (1,), step: (2,)} if step != 5 else {5: (1, 2)}
        assert_run_goes_on(run, allowed)
        if codes[victim] == 0:
            return boundary
        assert codes[victim] == SIGKILL
        boundary += 1


@pytest.mark.parametrize("step", [10, 5], ids=["new_step", "same_step_again"])
def test_kill_at_every_boundary_never_loses_the_run(tmp_path: Path, step: int) -> None:
    assert killed_everywhere(tmp_path, step, world=1, victim=0) >= 12


@pytest.mark.parametrize("victim", [0, 1])
def test_kill_of_one_rank_of_two_at_every_boundary(tmp_path: Path, victim: int) -> None:
    assert killed_everywhere(tmp_path, 10, world=2, victim=victim) >= (12 if victim == 0 else 1)


def test_a_killed_rank_leaves_the_earlier_checkpoint(
    tmp_path: Path, run: RunFolder, generation: Generation
) -> None:
    pieces.save_cut(run, generation, 5, pieces.whole(1), pieces.flat_cuts(2), 2)
    processes = ranks.start(
        2, tmp_path, ranks.save_and_die, 1, 0, 2, run.root, generation, 10, 2, 1
    )
    assert ranks.finish(processes)[1] == SIGKILL
    assert "Error" in ranks.result(tmp_path, 0)
    assert run.steps() == [5]
    assert_run_goes_on(run, {5: (1,)})


def test_two_ranks_save_and_three_load(
    tmp_path: Path, run: RunFolder, generation: Generation
) -> None:
    codes = ranks.finish(ranks.start(2, tmp_path, ranks.save, 2, run.root, generation, 10, 7, 2))
    assert codes == [0, 0] and ranks.result(tmp_path, 0) is None
    assert sorted(path.name for path in run.checkpoint(10).glob("*.safetensors")) == [
        "rank00000.safetensors",
        "rank00001.safetensors",
    ]
    three = tmp_path / "three"
    three.mkdir()
    assert ranks.finish(ranks.start(3, three, ranks.load, 3, run.root)) == [0, 0, 0]
    whole = pieces.whole(7)
    for rank in range(3):
        step, _, values = ranks.result(three, rank)
        own = pieces.values_of(pieces.cut(whole, pieces.flat_cuts(3), rank))
        assert step == 10 and values == own


def test_ranks_share_the_verification_and_agree(
    tmp_path: Path, run: RunFolder, generation: Generation
) -> None:
    for step in (5, 10):
        pieces.save_cut(run, generation, step, pieces.whole(step), pieces.even_cuts(2), 2)
    with (run.checkpoint(10) / "rank00001.safetensors").open("r+b") as file:
        file.write(b"x")
    assert ranks.finish(ranks.start(2, tmp_path, ranks.load, 2, run.root)) == [0, 0]
    for rank in (0, 1):
        step, seen, _ = ranks.result(tmp_path, rank)
        name = f"rank{rank:05d}.safetensors"
        assert step == 5 and seen == [f"00000010/{name}", f"00000005/{name}"]


def test_an_error_on_one_rank_is_raised_on_all(
    tmp_path: Path, run: RunFolder, generation: Generation
) -> None:
    arguments = (1, 2, run.root, generation)
    processes = ranks.start(2, tmp_path, ranks.save_on_a_full_disk, *arguments)
    assert ranks.finish(processes) == [0, 0]
    for rank in (0, 1):
        message = ranks.result(tmp_path, rank)
        assert "rank 1 cannot write checkpoint 10: " in message and "No space left" in message
    assert list(run.checkpoints.iterdir()) == []


def test_if_rank_0_is_refused_all_ranks_are(
    tmp_path: Path, run: RunFolder, generation: Generation
) -> None:
    claim_generation(run, "4711", 1)
    before = pieces.tree(run.root)
    processes = ranks.start(2, tmp_path, ranks.save, 2, run.root, generation, 10, 2, 1)
    assert ranks.finish(processes) == [0, 0]
    for rank in (0, 1):
        assert ranks.result(tmp_path, rank).startswith("Superseded: ")
    assert pieces.tree(run.root) == before


def test_replicated_state_is_written_once(
    tmp_path: Path, run: RunFolder, generation: Generation
) -> None:
    processes = ranks.start(2, tmp_path, ranks.save_replicated, run.root, generation, 3)
    assert ranks.finish(processes) == [0, 0]
    assert [path.name for path in run.checkpoint(10).glob("*.safetensors")] == [
        "rank00000.safetensors"
    ]
    assert_run_goes_on(run, {10: (3,)})
