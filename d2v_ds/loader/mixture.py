"""The mixture: which source gives which optimizer step, and a Loader for each of them.

    (weights, seed, step) --source_of--> source --its Loader--> StepBatch
                                                                with every source's cursor
A source is a shard set of one modality: speech, or speech/libri beside speech/cv. All micro-batches
of a step on all ranks are of one source, as a pure function of the step, so nothing of the mixture
itself needs saving; and each source is read in its own order, the same as in a run that has it
alone.
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

BLOCK = 100  # steps whose sources are shuffled together, at least


@dataclasses.dataclass(frozen=True)
class Shares:
    """The exact share of the steps that each source has: their sum is 1."""

    of: tuple[Fraction, ...]

    @classmethod
    def from_weights(cls, weights: Sequence[float]) -> Shares:
        """Of weights above 0, read as the decimals that people write."""
        exact = [Fraction(repr(weight)) for weight in weights]
        return cls(tuple(weight / sum(exact) for weight in exact))

    @property
    def block(self) -> int:
        """Steps of a block: enough that `counts` never has the heaviest source step back."""
        return max(BLOCK, len(self.of) ** 2)

    def counts(self, block: int) -> list[int]:
        """Steps of each source in the first `block` blocks.

        All but the heaviest get the whole part of their share, and it the rest: so none ever has
        fewer after more blocks (the heaviest gains at least n of n * n steps, the n - 1 others at
        most one each above their share), and at a block's end each is within one step of its
        share, the heaviest within n - 1.
        """
        heaviest = self.of.index(max(self.of))
        steps = block * self.block
        counts = [math.floor(share * steps) for share in self.of]
        counts[heaviest] = steps - sum(counts) + counts[heaviest]
        return counts


def shares_of(config: Config) -> Shares:
    """Of a run's sources, in their order."""
    return Shares.from_weights([config.data.weights.get(s, 1.0) for s in config.sources])


def source_of(shares: Shares, seed: int, step: int) -> int:
    """The place of the source of step `step` (from 0)."""
    return _order(shares, seed, step // shares.block)[step % shares.block]


@lru_cache(maxsize=4)
def _order(shares: Shares, seed: int, block: int) -> list[int]:
    """The sources of one block's steps."""
    before, after = shares.counts(block), shares.counts(block + 1)
    sources = [i for i, (a, b) in enumerate(zip(before, after, strict=True)) for _ in range(b - a)]
    return [sources[i] for i in permutation(len(sources), seed, SOURCE_ORDER, block)]


def divide_workers(workers: int, shares: Shares) -> list[int]:
    """Of `workers` processes each source's: by share, but one at least, so that every source is
    decoded ahead; none where there are none."""
    if workers == 0:
        return [0] * len(shares.of)
    own = [1] * len(shares.of)
    for _ in range(workers - len(own)):
        neediest = max(range(len(own)), key=lambda i: shares.of[i] / own[i])
        own[neediest] += 1
    return own


class Mixture:
    """The optimizer steps of a run over one or more sources, each with its Loader."""

    def __init__(
        self, loaders: Mapping[str, Loader | StreamLoader], shares: Shares, seed: int
    ) -> None:
        assert len(loaders) == len(shares.of), "one share a source"
        self.loaders, self.shares, self.seed = dict(loaders), shares, seed
        self.names = list(loaders)

    @property
    def cursor(self) -> dict[str, dict[str, Any]]:
        """Where each source's Loader stands: what a checkpoint keeps."""
        return {name: loader.cursor for name, loader in self.loaders.items()}

    def next(self, step: int) -> StepBatch:
        """The next batch of the source whose turn step `step` is, with the cursor after it. A
        step that was not taken is asked for again, and gets the source's following batch."""
        name = self.names[source_of(self.shares, self.seed, step)]
        batch = next(self.loaders[name])
        return dataclasses.replace(batch, source=name, cursor=self.cursor)

    def close(self) -> None:
        for loader in self.loaders.values():
            loader.close()
