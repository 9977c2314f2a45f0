"""The plan: lengths in the index -> which samples are in which micro-batch of which step.

    lengths -> shuffled order of an epoch -> pools -> sorted, cut into lots -> shuffled -> Step

A pure function of (lengths, the modality's settings, seed, epoch, batch.size,
batch.micro_batches). Nothing is read, and neither ranks nor workers appear. Lengths are in the
modality's length_unit, costs in its batch_unit. A sample is identified by its number in the
set, counted over the shards in the order of index.json; a lot is the samples of one micro-batch.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from d2v_ds.errors import UserError
from d2v_ds.modalities.base import Modality
from d2v_ds.seeding import LOT_ORDER, SAMPLE_ORDER, SHARD_ORDER, permutation

SampleIds = npt.NDArray[np.int64]

WINDOW = 65_536  # samples of adjacent shards that are shuffled together
POOL = 4_096  # samples sorted by cost together; more reduce padding, but also randomness
POOL_STEPS = 16  # a pool has at least this many steps, so that rounding to whole steps is cheap
SPARE = 8  # samples of similar cost that can replace those of a lot


@dataclass(frozen=True)
class Step:
    """The samples of one optimizer step, over all ranks."""

    epoch: int
    lots: Sequence[SampleIds]  # the samples of each micro-batch
    spare: Sequence[SampleIds]  # others of similar cost, in case no sample of a lot is usable
    masked: Sequence[int] | None  # tokens of each micro-batch; None: unknown until masks are drawn
    units: float  # seconds of audio, images or tokens in total, after cropping
    cursor: dict[str, int]  # after this step


@dataclass(frozen=True)
class EpochStats:
    """The first epoch in numbers; other epochs may have slightly more or fewer steps."""

    steps: int
    samples: int
    left_out: int  # too short or too long to be used
    units: float  # seconds of audio, images or tokens, after cropping
    padding: float  # share of padding in the batches


# A cursor; step: done in the epoch; pool_step: done in the pool.
START = {"epoch": 0, "step": 0, "pool": 0, "pool_step": 0}


class BatchPlan:
    """The steps of every epoch.

    Shards are shuffled, then the samples within windows of adjacent shards, so that reading stays
    within a few shards at a time. This order is cut into pools. A pool is sorted by cost and cut
    into lots whose padded cost is at most size / micro_batches; the lots are shuffled and assigned
    to steps, micro_batches per step. Every usable sample occurs once per epoch. The exception: if
    single samples fill a lot, up to micro_batches - 1 samples at the end of an epoch are left out.
    Only the current pool is computed, so seeking takes milliseconds in a set of any size.

    lengths: of all samples, one array per shard, in the unit of the index. Raises UserError if they
    are not enough for one step.
    """

    def __init__(
        self,
        lengths: Sequence[npt.NDArray[np.uint32]],
        modality: Modality,
        *,
        seed: int,
        size: float,
        micro_batches: int,
    ) -> None:
        self.seed, self.micro_batches, self.limit = seed, micro_batches, size / micro_batches
        self.bounds = np.cumsum([0, *map(len, lengths)])  # sample ids at which shards begin
        self.lengths = np.concatenate(lengths)
        # The modality is called once for each distinct length, not for each sample.
        self.distinct, counts = np.unique(self.lengths, return_counts=True)
        distinct = [int(length) for length in self.distinct]
        self.counts = dict(zip(distinct, counts.tolist(), strict=True))
        self.usable = np.array([modality.crop(n) > 0 for n in distinct], dtype=bool)
        self.cost = np.zeros(len(distinct))
        masked = np.zeros(len(distinct), dtype=np.int64)
        varies = False  # whether the number of masked tokens of a length is random
        for kind in np.flatnonzero(self.usable):
            self.cost[kind] = modality.cost(distinct[kind])
            tokens = modality.masked_tokens(distinct[kind])
            masked[kind], varies = tokens or 0, varies or tokens is None
        self.masked = None if varies else masked
        assert (self.cost[self.usable] > 0).all(), f"{modality.name}: a sample costs nothing"
        self.used = np.array([len(self.usable_in(shard)) for shard in range(len(lengths))])
        self.samples = int(self.used.sum())
        self._require_one_step(modality, size)
        mean_cost = float((self.cost * counts).sum()) / self.samples
        pools = max(1, self.samples // max(POOL, int(POOL_STEPS * size / mean_cost)))
        # Multiples of micro_batches, so that only the last pool can have samples left over.
        self.pools = [
            self.samples * i // pools // micro_batches * micro_batches for i in range(pools)
        ] + [self.samples]

    def _require_one_step(self, modality: Modality, size: float) -> None:
        lots = self.micro_batches
        if self.samples < lots:
            why = ", ".join(modality.remarks(self.counts))
            raise UserError(
                f"data.shards: modality.{modality.name} can use only {self.samples} of "
                f"{len(self.lengths)} samples{f' ({why})' if why else ''}, but a step of "
                f"batch.micro_batches={lots} needs {lots}. Add data, allow other lengths or use "
                "fewer micro-batches"
            )
        require_room(modality, size, lots, float(self.cost.max()))

    def kinds(self, ids: SampleIds) -> npt.NDArray[np.intp]:
        """Indices of samples in the tables of distinct lengths."""
        return np.searchsorted(self.distinct, self.lengths[ids])

    def usable_in(self, shard: int) -> SampleIds:
        """The usable samples of a shard."""
        ids = np.arange(self.bounds[shard], self.bounds[shard + 1])
        usable: SampleIds = ids[self.usable[self.kinds(ids)]]
        return usable

    def steps(self, cursor: Mapping[str, int] = START) -> Iterator[Step]:
        """The steps after `cursor`, endlessly."""
        epoch, step, pool, pool_step = (cursor[key] for key in START)
        while True:
            order = _Order(self, epoch)
            while pool < len(self.pools) - 1:
                lots = self._lots(order, pool)
                while pool_step * self.micro_batches < len(lots):
                    dealt = lots[pool_step * self.micro_batches :][: self.micro_batches]
                    step, pool_step = step + 1, pool_step + 1
                    after = dict(zip(START, (epoch, step, pool, pool_step), strict=True))
                    yield self._step(epoch, dealt, after)
                pool, pool_step = pool + 1, 0
            epoch, step, pool = epoch + 1, 0, 0

    def upcoming(self, cursor: Mapping[str, int]) -> Iterator[int]:
        """The shards in the order in which they are read from `cursor` on, endlessly."""
        order = _Order(self, cursor["epoch"])
        shards = order.shards[order.first_shards[order.window_of(self.pools[cursor["pool"]])] :]
        while True:
            yield from shards.tolist()
            order = _Order(self, order.epoch + 1)
            shards = order.shards

    def _step(self, epoch: int, dealt: Sequence[_Dealt], cursor: dict[str, int]) -> Step:
        lots, spare = zip(*dealt, strict=True)
        kinds = [self.kinds(lot) for lot in lots]
        return Step(
            epoch=epoch,
            lots=lots,
            spare=spare,
            masked=None if self.masked is None else [int(self.masked[k].sum()) for k in kinds],
            units=float(sum(self.cost[k].sum() for k in kinds)),
            cursor=cursor,
        )

    def _lots(self, order: _Order, pool: int) -> list[_Dealt]:
        """The lots of a pool with their spare samples, in the order of the steps."""
        ids = order.slice(self.pools[pool], self.pools[pool + 1])
        cost = self.cost[self.kinds(ids)]
        # A stable sort, so that samples of equal cost stay in random order.
        descending = np.argsort(-cost, kind="stable")
        bounds = cut(cost[descending].tolist(), self.limit, self.micro_batches)
        if not bounds:  # each sample fills a lot; the last ones of this order are left out
            descending = np.arange(len(cost) // self.micro_batches * self.micro_batches)
            bounds = list(range(len(descending) + 1))
        shuffled = permutation(len(bounds) - 1, self.seed, LOT_ORDER, order.epoch, pool)
        sorted_ = ids[descending]
        return [_deal(sorted_, bounds[i], bounds[i + 1]) for i in shuffled]

    def stats(self) -> EpochStats:
        """Plans the whole first epoch: a few seconds for a million samples."""
        order = _Order(self, 0)
        lots = [lot for pool in range(len(self.pools) - 1) for lot, _ in self._lots(order, pool)]
        costs = [self.cost[self.kinds(lot)] for lot in lots]
        units = float(sum(cost.sum() for cost in costs))
        padded = float(sum(cost.max() * len(cost) for cost in costs))
        return EpochStats(
            steps=len(lots) // self.micro_batches,
            samples=sum(map(len, lots)),
            left_out=len(self.lengths) - self.samples,
            units=units,
            padding=1 - units / padded,
        )


_Dealt = tuple[SampleIds, SampleIds]  # a lot and its spare samples


def _deal(pool: SampleIds, start: int, stop: int) -> _Dealt:
    """The lot between two bounds of a sorted pool, and its neighbours: costlier ones first, which
    can be cut to size, while cheaper ones have to be repeated."""
    before = pool[max(0, start - SPARE) : start][::-1]
    after = pool[stop : stop + SPARE]
    return pool[start:stop], np.concatenate([before, after])[:SPARE]


class _Order:
    """The order of one epoch's usable samples; holds one window of it at a time."""

    def __init__(self, plan: BatchPlan, epoch: int) -> None:
        self.plan, self.epoch = plan, epoch
        self.shards = permutation(len(plan.used), plan.seed, SHARD_ORDER, epoch)
        used = plan.used[self.shards]
        starts = np.cumsum(used) - used
        first = np.flatnonzero(np.diff(starts // WINDOW, prepend=-1))
        self.first_shards = np.append(first, len(self.shards))  # of the windows
        self.bounds = np.append(starts[first], plan.samples)  # of the windows, in this order
        self.window = -1
        self.ids = np.zeros(0, dtype=np.int64)  # of that window

    def window_of(self, number: int) -> int:
        """The window of sample `number` in this order."""
        return int(np.searchsorted(self.bounds, number, side="right")) - 1

    def slice(self, start: int, stop: int) -> SampleIds:
        window = self.window_of(start)
        parts = []
        while start < stop:
            begin, end = int(self.bounds[window]), min(stop, int(self.bounds[window + 1]))
            parts.append(self._samples(window)[start - begin : end - begin])
            start, window = end, window + 1
        return np.concatenate(parts)

    def _samples(self, window: int) -> SampleIds:
        if window != self.window:
            shards = self.shards[self.first_shards[window] : self.first_shards[window + 1]]
            ids = np.concatenate([self.plan.usable_in(shard) for shard in shards])
            shuffled = permutation(len(ids), self.plan.seed, SAMPLE_ORDER, self.epoch, window)
            self.window, self.ids = window, ids[shuffled]
        return self.ids


def require_room(modality: Modality, size: float, lots: int, most: float) -> None:
    """Raises UserError if a sample of cost `most` is too large for a micro-batch."""
    if most <= size / lots:
        return
    unit, fewer = modality.batch_unit, int(size // most)
    raise UserError(
        f"batch.size: {size:g} {unit} in {lots} micro-batches leaves {size / lots:g} {unit} "
        f"for each, but one sample has up to {most:g}. Use at least {most * lots:g}"
        + (f", at most {fewer} micro-batches" if fewer else "")
        + f" or smaller samples (modality.{modality.name})"
    )


# ------------------------------------------------------------------------------------------ cutting


def cut(costs: Sequence[float], limit: float, multiple: int) -> list[int]:
    """The bounds of lots of consecutive samples; the number of lots is a multiple of `multiple`.

    costs: descending, none above limit. The padded cost of a lot, the number of its samples times
    its first cost, is at most `limit`. The number of lots is as small as that allows; bisection
    finds the lowest limit for which this number suffices, which makes the lots about equal. Empty
    if there are fewer samples than lots.
    """
    wanted = -(-_count(costs, limit) // multiple) * multiple
    if wanted > len(costs):
        return []
    low = max(costs[0], math.fsum(costs) / wanted)
    while limit - low > 1e-3 * low:
        middle = (low + limit) / 2
        if _count(costs, middle) <= wanted:
            limit = middle
        else:
            low = middle
    return _split(costs, _greedy(costs, limit), wanted)


def _greedy(costs: Sequence[float], limit: float) -> list[int]:
    """The bounds of the fewest lots within `limit`: each takes as many samples as fit."""
    bounds = [0]
    while bounds[-1] < len(costs):
        start = bounds[-1]
        bounds.append(min(start + int(limit // costs[start]), len(costs)))
    return bounds


def _count(costs: Sequence[float], limit: float) -> int:
    return len(_greedy(costs, limit)) - 1


def _split(costs: Sequence[float], bounds: list[int], wanted: int) -> list[int]:
    """Halves the costliest lots until there are `wanted` of them."""
    lots = [(-costs[a] * (b - a), a, b) for a, b in pairwise(bounds) if b - a > 1]
    heapq.heapify(lots)
    while len(bounds) <= wanted:
        _, start, stop = heapq.heappop(lots)
        middle = (start + stop) // 2
        bounds.append(middle)
        for a, b in ((start, middle), (middle, stop)):
            if b - a > 1:
                heapq.heappush(lots, (-costs[a] * (b - a), a, b))
    return sorted(bounds)
