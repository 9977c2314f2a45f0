"""The mixture: which source each optimizer step comes from, and a loader for each source.

    (weights, seed, step) --source_of--> source --its loader--> StepBatch with all sources' cursors

A source is a shard set of one modality: speech, or speech/libri and speech/cv. All micro-batches of
a step come from one source on all ranks. The source is a pure function of the step, so the mixture
has no state to save, and each source is read in the same order as in a run of its own.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Any

from d2v_ds.batch import StepBatch
from d2v_ds.config import Config
from d2v_ds.loader.loader import Loader
from d2v_ds.loader.stream import StreamLoader
from d2v_ds.seeding import SOURCE_ORDER, permutation

BLOCK = 100  # at least this many steps have their sources shuffled together


@dataclasses.dataclass(frozen=True)
class Shares:
    """The exact share of each source in the steps; they sum to 1."""

    of: tuple[Fraction, ...]

    @classmethod
    def from_weights(cls, weights: Sequence[float]) -> Shares:
        """From weights above 0, which are taken as exact decimals."""
        exact = [Fraction(repr(weight)) for weight in weights]
        return cls(tuple(weight / sum(exact) for weight in exact))

    @property
    def block(self) -> int:
        """The number of steps in a block: enough for `counts` never to decrease."""
        return max(BLOCK, len(self.of) ** 2)

    def counts(self, block: int) -> list[int]:
        """The number of steps of each source in the first `block` blocks.

        Every source but the heaviest gets its share rounded down, and the heaviest gets the rest.
        So the counts never decrease from block to block (the heaviest source gains at least n of
        n * n steps, the n - 1 others at most one more than their share), and after each block every
        source is within one step of its share, the heaviest within n - 1.
        """
        heaviest = self.of.index(max(self.of))
        steps = block * self.block
        counts = [math.floor(share * steps) for share in self.of]
        counts[heaviest] = steps - sum(counts) + counts[heaviest]
        return counts


def shares_of(config: Config) -> Shares:
    """The shares of a run's sources, in order."""
    return Shares.from_weights([config.data.weights.get(s, 1.0) for s in config.sources])


def source_of(shares: Shares, seed: int, step: int) -> int:
    """The index of the source of step `step` (from 0)."""
    return _order(shares, seed, step // shares.block)[step % shares.block]


@lru_cache(maxsize=4)
def _order(shares: Shares, seed: int, block: int) -> list[int]:
    """The sources of one block's steps."""
    before, after = shares.counts(block), shares.counts(block + 1)
    sources = [i for i, (a, b) in enumerate(zip(before, after, strict=True)) for _ in range(b - a)]
    return [sources[i] for i in permutation(len(sources), seed, SOURCE_ORDER, block)]


def divide_workers(workers: int, shares: Shares) -> list[int]:
    """The number of worker processes of each source, out of `workers`: by its share, but at least
    one, so that every source is decoded in advance; none if `workers` is 0."""
    if workers == 0:
        return [0] * len(shares.of)
    own = [1] * len(shares.of)
    for _ in range(workers - len(own)):
        neediest = max(range(len(own)), key=lambda i: shares.of[i] / own[i])
        own[neediest] += 1
    return own


class Mixture:
    """The optimizer steps of a run over one or more sources, each with a loader."""

    def __init__(
        self, loaders: Mapping[str, Loader | StreamLoader], shares: Shares, seed: int
    ) -> None:
        assert len(loaders) == len(shares.of), "one share per source"
        self.loaders, self.shares, self.seed = dict(loaders), shares, seed
        self.names = list(loaders)

    @property
    def cursor(self) -> dict[str, dict[str, Any]]:
        """The cursors of all sources: what a checkpoint stores."""
        return {name: loader.cursor for name, loader in self.loaders.items()}

    def next(self, step: int) -> StepBatch:
        """The next batch of step `step`'s source, with all cursors after it. A skipped step is
        requested again and gets the next batch of the same source."""
        name = self.names[source_of(self.shares, self.seed, step)]
        batch = next(self.loaders[name])
        return dataclasses.replace(batch, source=name, cursor=self.cursor)

    def close(self) -> None:
        for loader in self.loaders.values():
            loader.close()
