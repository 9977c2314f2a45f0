"""The mixture: exact shares, resuming at any step, and the same order of each source as alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from d2v_ds.loader.loader import Loader
from d2v_ds.loader.mixture import Mixture, Shares, divide_workers, source_of
from tests.helpers.sensor import Sensor, SensorConfig
from tests.helpers.series import modality as series_modality
from tests.helpers.series import write_set

WEIGHTS = st.lists(
    st.one_of(st.integers(1, 1000).map(float), st.floats(1e-4, 1e4)), min_size=1, max_size=12
)


def test_weights_are_exact_decimals() -> None:
    assert Shares.from_weights([0.1, 0.2, 0.7]).of == tuple(Fraction(n, 10) for n in (1, 2, 7))
    assert Shares.from_weights([1.0, 1.0, 1.0]).of == (Fraction(1, 3),) * 3


@settings(deadline=None)
@given(WEIGHTS, st.integers(0, 10**7))
def test_counts_never_decrease_and_stay_within_a_step_of_the_shares(
    weights: list[float], block: int
) -> None:
    shares = Shares.from_weights(weights)
    before, after = shares.counts(block), shares.counts(block + 1)
    assert sum(after) - sum(before) == shares.block
    assert all(b >= a for a, b in zip(before, after, strict=True))
    heaviest = shares.of.index(max(shares.of))
    for i, share in enumerate(shares.of):
        error = after[i] - share * (block + 1) * shares.block
        assert -1 < error <= 0 if i != heaviest else 0 <= error < max(1, len(weights) - 1)


def test_counts_of_many_small_sources_never_decrease() -> None:
    """With blocks of 100 steps, those of the heaviest of 31 equal sources would decrease."""
    shares = Shares.from_weights([1.0] * 31)
    drawn = Counter(source_of(shares, 0, step) for step in range(10 * shares.block))
    assert max(drawn.values()) - min(drawn.values()) <= 31
    narrow = [sum(int(Fraction(n * 100, 31)) for _ in range(30)) for n in range(32)]
    assert any(b - a > 100 for a, b in pairwise(narrow))


@settings(deadline=None, max_examples=30)
@given(WEIGHTS, st.integers(0, 2**31), st.integers(0, 50))
def test_a_block_draws_sources_by_their_counts(weights: list[float], seed: int, block: int) -> None:
    shares = Shares.from_weights(weights)
    steps = range(block * shares.block, (block + 1) * shares.block)
    drawn = Counter(source_of(shares, seed, step) for step in steps)
    before, after = shares.counts(block), shares.counts(block + 1)
    assert drawn == Counter({i: b - a for i, (a, b) in enumerate(zip(before, after, strict=True))})


def test_the_order_is_shuffled_and_follows_the_seed() -> None:
    shares = Shares.from_weights([1.0, 1.0])
    orders = [tuple(source_of(shares, seed, s) for s in range(200)) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert orders[0][:100] != orders[0][100:], "every block has its own order"
    # Pinned: a run that is resumed years later must draw the same sources.
    assert "".join(map(str, orders[0][:40])) == "1011011100101000111000101000100001001100"


def test_workers_are_divided_by_share_and_every_source_has_one() -> None:
    shares = Shares.from_weights([6.0, 3.0, 1.0])
    assert [divide_workers(n, shares) for n in (0, 1, 3, 4, 6, 10)] == [
        [0, 0, 0],
        [1, 1, 1],
        [1, 1, 1],
        [2, 1, 1],
        [3, 2, 1],
        [6, 3, 1],
    ]


LENGTHS = {"series/a": [[40, 60, 80] * 4, [100] * 6], "series/b": [[30, 50] * 10]}


def mixture(
    root: Path, cursor: dict[str, Any] | None = None, workers: int = 0, **settings: Any
) -> Mixture:
    loaders = {}
    for source, lengths in LENGTHS.items():
        folder = root / source.replace("/", "-")
        loaders[source] = Loader(
            write_set(folder, lengths) if not folder.exists() else open_series(folder),
            series_modality(),
            seed=3,
            size=400,
            micro_batches=2,
            workers=workers,
            cursor=(cursor or {}).get(source),
            **settings,
        )
    return Mixture(loaders, Shares.from_weights([2.0, 1.0]), seed=3)


def open_series(folder: Path) -> Any:
    from d2v_ds.data.shard_format import open_set

    return open_set(folder, "series")


def content(step: Any) -> Any:
    return step.source, step.cursor, [(b.keys, b.masked.tolist()) for b in step.micro_batches]


def test_a_mixture_resumes_from_any_step(tmp_path: Path) -> None:
    whole = mixture(tmp_path)
    steps = [content(whole.next(step)) for step in range(60)]
    whole.close()
    assert {source for source, *_ in steps} == set(LENGTHS)
    assert steps[-1][1]["series/b"]["epoch"] > 0, "the steps must cross the end of an epoch"
    for middle in (1, 17, 43):
        rest = mixture(tmp_path, steps[middle - 1][1], workers=1 if middle == 17 else 0)
        assert [content(rest.next(step)) for step in range(middle, 60)] == steps[middle:]
        rest.close()


def test_every_source_is_read_as_in_a_run_of_its_own(tmp_path: Path) -> None:
    mixed = mixture(tmp_path)
    drawn = [mixed.next(step) for step in range(40)]
    mixed.close()
    for source in LENGTHS:
        own = [step for step in drawn if step.source == source]
        alone = mixture(tmp_path).loaders[source]
        for ours, theirs in zip(own, islice(alone, len(own)), strict=True):
            assert content(ours)[2] == content(theirs)[2]
            assert ours.cursor[source] == theirs.cursor
        alone.close()


def test_a_skipped_step_gets_the_next_batch_of_its_source(tmp_path: Path) -> None:
    mixed = mixture(tmp_path)
    first, again = mixed.next(0), mixed.next(0)
    assert first.source == again.source
    mixed.close()
    alone = mixture(tmp_path).loaders[first.source]
    theirs = [content(step)[2] for step in islice(alone, 2)]
    assert [content(first)[2], content(again)[2]] == theirs and theirs[0] != theirs[1]
    alone.close()


class Drawn(Sensor):
    """Random numbers of masked tokens, which the ranks sum."""

    def masked_tokens(self, length: int) -> None:  # type: ignore[override]
        return None


def counts_of(root: str) -> list[tuple[str, int, int]]:
    """(source, masked tokens of the step, masked tokens of this rank) for each step."""
    loaders = {
        source: Loader(
            open_series(Path(root) / source.replace("/", "-")),
            Drawn(SensorConfig()) if source == "series/a" else series_modality(),
            seed=3,
            size=400,
            micro_batches=2,
            rank=dist.get_rank(),
            world=2,
        )
        for source in LENGTHS
    }
    mixed = Mixture(loaders, Shares.from_weights([2.0, 1.0]), seed=3)
    steps = [mixed.next(step) for step in range(30)]
    mixed.close()
    return [(s.source, s.count, sum(len(b.masked) for b in s.micro_batches)) for s in steps]


def test_ranks_sum_the_counts_of_the_same_step(
    tmp_path: Path, run_ranks: Callable[..., list[Any]]
) -> None:
    mixture(tmp_path).close()
    first, second = run_ranks(2, counts_of, str(tmp_path))
    for (source, count, mine), (other, again, theirs) in zip(first, second, strict=True):
        assert source == other and count == again == mine + theirs
    assert len({count for _, count, _ in first}) > 5


@pytest.mark.parametrize("weights", [[1.0], [5.0, 1.0]])
def test_seeking_far_ahead_is_fast(weights: list[float]) -> None:
    shares = Shares.from_weights(weights)
    assert source_of(shares, 0, 10**12) in range(len(weights))
