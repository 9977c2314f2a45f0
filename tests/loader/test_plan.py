"""The batch plan: every sample once, lots within the budget, little padding, seeks, fixed order."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from d2v_ds.errors import UserError
from d2v_ds.loader import plan as plan_module
from d2v_ds.loader.plan import START, BatchPlan, Step, cut, permutation
from d2v_ds.modalities.speech import Speech, SpeechConfig
from tests.helpers.sensor import Sensor, SensorConfig
from tests.helpers.series import modality as series_modality

SHARDS = [[10 + 37 * i % 200 for i in range(n)] for n in (50, 7, 90, 33, 20)]


def make_plan(
    shards: Sequence[Sequence[int]],
    *,
    seed: int = 0,
    size: float = 1600,
    micro_batches: int = 4,
    modality: Sensor | None = None,
) -> BatchPlan:
    lengths = [np.array(shard, dtype=np.uint32) for shard in shards]
    return BatchPlan(
        lengths,
        modality or series_modality(),  # type: ignore[arg-type]
        seed=seed,
        size=size,
        micro_batches=micro_batches,
    )


def epoch(plan: BatchPlan, number: int = 0) -> list[Step]:
    steps = plan.steps({**START, "epoch": number})
    return list(itertools.takewhile(lambda step: step.epoch == number, steps))


def dealt(steps: Sequence[Step]) -> list[int]:
    """The ids of all samples, in the order of reading."""
    return [int(p) for step in steps for lot in step.lots for p in lot]


def lots_of(steps: Sequence[Step]) -> list[list[int]]:
    return [lot.tolist() for step in steps for lot in step.lots]


@pytest.fixture
def small_pools(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes windows and pools so small that sets of a few hundred samples have several."""
    monkeypatch.setattr(plan_module, "WINDOW", 60)
    monkeypatch.setattr(plan_module, "POOL", 40)
    monkeypatch.setattr(plan_module, "POOL_STEPS", 3)


# ---------------------------------------------------------------------------------------- the plan


@pytest.mark.usefixtures("small_pools")
def test_every_sample_occurs_once_per_epoch() -> None:
    plan = make_plan(SHARDS)
    assert len(plan.pools) > 3
    for number in range(3):
        assert sorted(dealt(epoch(plan, number))) == list(range(200))


@pytest.mark.usefixtures("small_pools")
def test_epochs_and_seeds_differ_and_repeat() -> None:
    first = dealt(epoch(make_plan(SHARDS)))
    assert first == dealt(epoch(make_plan(SHARDS)))
    assert first != dealt(epoch(make_plan(SHARDS), 1))
    assert first != dealt(epoch(make_plan(SHARDS, seed=1)))


def test_the_orders_of_two_epochs_are_uncorrelated() -> None:
    """Rank correlation of samples in two epochs, and in the set and an epoch."""
    plan = make_plan([[50] * 500] * 8, size=400)
    place = np.argsort([dealt(epoch(plan, number)) for number in range(2)], axis=1)
    bound = 4.5 / np.sqrt(4000)
    assert abs(np.corrcoef(place)[0, 1]) < bound
    assert abs(np.corrcoef(place[0], np.arange(4000))[0, 1]) < bound


def test_samples_that_are_read_together_come_from_few_shards(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(plan_module, "WINDOW", 400)
    monkeypatch.setattr(plan_module, "POOL", 100)
    plan = make_plan([[50] * 100] * 60, size=400)
    order = dealt(epoch(plan))
    for start in range(0, 6000, 100):
        assert len({sample_id // 100 for sample_id in order[start : start + 100]}) <= 8


def test_lots_stay_within_the_budget_and_samples_too_short_are_left_out() -> None:
    modality = series_modality(crop=120, least=40)
    plan = make_plan(SHARDS, modality=modality)
    lengths = np.concatenate([np.array(shard) for shard in SHARDS])
    steps = epoch(plan)
    assert sorted(dealt(steps)) == np.flatnonzero(lengths >= 40).tolist()
    for lot in lots_of(steps):
        assert len(lot) * max(min(lengths[p], 120) for p in lot) <= 1600 / 4
    stats = plan.stats()
    assert stats.steps == len(steps) and stats.samples == len(dealt(steps))
    assert stats.left_out == 200 - stats.samples
    assert stats.units == sum(step.units for step in steps)
    assert stats.units == np.minimum(lengths, 120)[lengths >= 40].sum()
    padded = sum(len(lot) * max(min(lengths[p], 120) for p in lot) for lot in lots_of(steps))
    assert stats.padding == pytest.approx(1 - stats.units / padded)


def test_the_plan_counts_masked_tokens() -> None:
    plan, modality = make_plan(SHARDS), series_modality()
    for step in epoch(plan):
        for lot, masked in zip(step.lots, step.masked, strict=True):
            assert masked == sum(modality.masked_tokens(int(plan.lengths[p])) for p in lot)


def test_samples_left_over_if_each_fills_a_lot() -> None:
    """41 samples of the largest size in steps of 4: one per lot; one is left for other epochs."""
    plan = make_plan([[200] * 41], size=800)
    left = []
    for number in range(12):
        steps = epoch(plan, number)
        order = dealt(steps)
        assert len(steps) == 10 and all(len(lot) == 1 for lot in lots_of(steps))
        assert len(set(order)) == 40
        left += set(range(41)) - set(order)
    assert len(set(left)) > 3
    assert plan.stats().samples == 40 and plan.stats().left_out == 0


@given(
    shards=st.lists(st.lists(st.integers(1, 400), max_size=60), min_size=1, max_size=8),
    seed=st.integers(0, 2**40),
    micro_batches=st.integers(1, 9),
    room=st.floats(1, 12),
    seek=st.integers(0, 30),
)
@settings(max_examples=150, deadline=None)
def test_plan_properties(
    shards: list[list[int]], seed: int, micro_batches: int, room: float, seek: int
) -> None:
    """For any input, no sample is lost or repeated, steps are equal, and seeks are exact."""
    usable = sum(n >= 8 for shard in shards for n in shard)
    assume(usable >= micro_batches)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("WINDOW", 50), ("POOL", 30), ("POOL_STEPS", 2)):
            patch.setattr(plan_module, name, value)
        size = 200 * room * micro_batches
        plan = make_plan(shards, seed=seed, size=size, micro_batches=micro_batches)
        for number in range(2):
            steps = epoch(plan, number)
            order = dealt(steps)
            assert len(set(order)) == len(order)
            # Samples are left over only if single ones fill a lot, and fewer than a step.
            over = usable - len(order)
            assert over == 0 or (over < micro_batches and 1 in map(len, lots_of(steps)))
            for step in steps:
                assert len(step.lots) == micro_batches
                for lot in step.lots:
                    costs = [min(int(plan.lengths[p]), 200) for p in lot]
                    assert len(lot) * max(costs) <= size / micro_batches
                    assert min(costs) >= 8
        whole = list(itertools.islice(plan.steps(), seek + 3))
        resumed = list(itertools.islice(plan.steps(whole[seek].cursor), 2))
        assert lots_of(resumed) == lots_of(whole[seek + 1 :])
        assert [step.cursor for step in resumed] == [s.cursor for s in whole[seek + 1 :]]


def test_order_is_pinned() -> None:
    """Must never change: runs would resume with other batches."""
    steps = itertools.islice(make_plan([range(20, 40), range(100, 120)], seed=5).steps(), 2)
    assert lots_of(list(steps)) == PINNED_LOTS
    assert permutation(8, 3, 1).tolist() == PINNED_PERMUTATION


PINNED_LOTS = [
    *([39, 38], [33, 32], [20, 19, 18], [35, 34]),
    *([25, 24], [27, 26], [9, 8, 7, 6, 5, 4, 3, 2, 1, 0], [37, 36]),
]
PINNED_PERMUTATION = [7, 1, 5, 3, 6, 0, 2, 4]


# --------------------------------------------------------------------------------------- at scale


def librispeech_like(samples: int) -> list[npt.NDArray[np.uint32]]:
    """Seconds at 16 kHz: most utterances take 12 to 17 s, with a broad tail below and few above."""
    rng = np.random.default_rng(0)
    kind = rng.random(samples)
    seconds = np.where(kind < 0.3, rng.uniform(1.3, 12, samples), rng.normal(14.2, 1.3, samples))
    seconds = np.where(kind > 0.97, rng.uniform(15, 35, samples), seconds).clip(1.2, 35)
    return np.array_split((seconds * 16_000).astype(np.uint32), 100)


class Speechlike(Sensor):
    """Published sizes: crops of 20 s, at least 2 s; costs in seconds."""

    def __init__(self) -> None:
        super().__init__(SensorConfig(crop=320_000, least=32_000))

    def cost(self, length: int) -> float:
        return self.crop(length) / 16_000


@pytest.mark.parametrize(("size", "micro_batches"), [(1000, 16), (3800, 16), (240, 4)])
def test_padding_is_at_most_one_percent_on_lengths_like_librispeech(
    size: float, micro_batches: int
) -> None:
    plan = BatchPlan(
        librispeech_like(50_000),
        Speechlike(),  # type: ignore[arg-type]
        seed=0,
        size=size,
        micro_batches=micro_batches,
    )
    stats = plan.stats()
    assert stats.samples + stats.left_out == 50_000
    assert stats.padding <= 0.01
    assert stats.units / stats.steps >= 0.85 * size


def test_upcoming_shards_are_the_next_ones_read(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("WINDOW", 100), ("POOL", 100), ("POOL_STEPS", 1)):
        monkeypatch.setattr(plan_module, name, value)
    plan = make_plan([[50] * 50] * 12, size=800)
    assert len(plan.pools) == 7
    for _, steps in itertools.groupby(epoch(plan), lambda step: step.cursor["pool"]):
        pool = list(steps)
        read = {sample_id // 50 for sample_id in dealt(pool)}
        ahead = list(itertools.islice(plan.upcoming(pool[0].cursor), 3))
        assert read <= set(ahead), "two shards, or three if it begins within a window"
    epochs = list(itertools.islice(plan.upcoming(START), 24))
    assert sorted(epochs[:12]) == sorted(epochs[12:]) == list(range(12))
    assert epochs[:12] != epochs[12:]


def test_seeking_among_a_million_samples_plans_only_one_pool(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So a resumed run starts at once. `benchmarks/loader.py plan` measures the time."""
    pools, cut_samples = [], 0
    lots = BatchPlan._lots

    def counted(costs: Sequence[float], limit: float, multiple: int) -> list[int]:
        nonlocal cut_samples
        cut_samples += len(costs)
        return cut(costs, limit, multiple)

    monkeypatch.setattr(plan_module, "cut", counted)
    monkeypatch.setattr(BatchPlan, "_lots", lambda *given: pools.append(given[2]) or lots(*given))
    plan = BatchPlan(
        librispeech_like(1_000_000), Speech(SpeechConfig()), seed=0, size=1000, micro_batches=16
    )
    middle = len(plan.pools) // 2
    cursor = {"epoch": 7, "step": 2000, "pool": middle, "pool_step": 3}
    step = next(plan.steps(cursor))
    assert step.cursor == cursor | {"step": 2001, "pool_step": 4}
    assert pools == [middle] and cut_samples < 10_000


# ----------------------------------------------------------------------------------------- cutting


@given(
    costs=st.lists(st.floats(0.01, 10), min_size=1, max_size=200),
    room=st.floats(1, 30),
    multiple=st.integers(1, 10),
)
def test_cut_makes_as_few_lots_as_possible(costs: list[float], room: float, multiple: int) -> None:
    costs.sort(reverse=True)
    limit = max(costs[0], costs[0] * room)
    bounds = cut(costs, limit, multiple)
    fewest, start = 0, 0
    while start < len(costs):
        start += int(limit // costs[start])
        fewest += 1
    wanted = -(-fewest // multiple) * multiple
    if wanted > len(costs):
        assert bounds == [] and len(costs) % multiple
        return
    assert len(bounds) == wanted + 1
    assert bounds[0] == 0 and bounds[-1] == len(costs) and bounds == sorted(set(bounds))
    assert all(costs[a] * (b - a) <= limit for a, b in itertools.pairwise(bounds))


def test_cut_makes_lots_of_similar_size() -> None:
    """100 equal samples, at most 30 per lot: 4 lots of 25 samples, not 30, 30, 30 and 10."""
    assert cut([1.0] * 100, 30, 1) == [0, 25, 50, 75, 100]
    assert cut([1.0] * 100, 30, 8) == [0, 13, 26, 39, 52, 65, 78, 91, 100]
    assert cut([4.0, 2.0, 2.0, 1.0, 1.0, 1.0, 1.0], 4, 3) == [0, 1, 3, 7]


# ------------------------------------------------------------------------------------------ errors


def test_too_few_samples_for_a_step() -> None:
    with pytest.raises(UserError) as caught:
        make_plan([[3, 50], [60, 70]], micro_batches=4)
    assert str(caught.value) == (
        "data.shards: modality.series can use only 3 of 4 samples (1 samples are too short), but a "
        "step of batch.micro_batches=4 needs 4. Add data, allow other lengths or use fewer "
        "micro-batches"
    )
    with pytest.raises(UserError, match="0 of 2 samples"):
        make_plan([[1, 2]], micro_batches=1)


def test_a_budget_that_one_sample_exceeds() -> None:
    with pytest.raises(UserError) as caught:
        make_plan([[150] * 20], size=500, micro_batches=4)
    assert str(caught.value) == (
        "batch.size: 500 numbers in 4 micro-batches leaves 125 numbers for each, but one sample "
        "has up to 150. Use at least 600, at most 3 micro-batches or smaller samples "
        "(modality.series)"
    )
    make_plan([[150] * 20], size=600, micro_batches=4)
    make_plan([[150] * 20], size=500, micro_batches=3)
