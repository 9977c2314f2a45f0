"""The loader of one shard set: this rank's part of every optimizer step.

BatchPlan.steps(cursor) --lots--> workers: read, decode, collate --> StepBatch
"""

from __future__ import annotations

import contextlib
import dataclasses
import queue
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

from d2v_ds.batch import StepBatch
from d2v_ds.config.config import require_divisible
from d2v_ds.data.cache.remote import prefetch
from d2v_ds.data.cache.renew import lengths_for
from d2v_ds.data.checks import summary
from d2v_ds.data.shard_format import ShardEntry, ShardSet, fingerprint
from d2v_ds.distributed.collectives import RankSums
from d2v_ds.errors import UserError
from d2v_ds.loader.plan import START, BatchPlan, EpochStats, Step
from d2v_ds.loader.quarantine import Quarantine
from d2v_ds.loader.reading import Lot, Made, MicroBatches, Reader
from d2v_ds.loader.workers import LoaderWorkers
from d2v_ds.modalities.base import Modality

PATIENCE = 300.0  # seconds that a worker may take for a micro-batch


class Loader:
    """This rank's part of every optimizer step over a shard set: iterates StepBatch, endlessly.

    size: of a whole step, in the modality's batch_unit. workers: processes that decode in advance;
    0: decode in this process. cursor: of a StepBatch, to resume after it. quarantine: where bad
    samples are recorded, and how many are allowed. patience: seconds that a worker may take for a
    micro-batch.

    Raises UserError if the settings do not fit each other or the set, or if the set differs from
    that of `cursor`; while iterating, if a shard cannot be read or too many samples are bad, and
    what the workers raise. If the number of masked tokens does not follow from lengths
    (Modality.masked_tokens), the ranks sum theirs, and must take every step together.

    mixture.py combines several loaders, one source per step.
    """

    def __init__(
        self,
        shards: ShardSet,
        modality: Modality,
        *,
        seed: int,
        size: float,
        micro_batches: int,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        cursor: Mapping[str, int] | None = None,
        quarantine: Quarantine | None = None,
        patience: float = PATIENCE,
    ) -> None:
        assert 0 <= rank < world, f"rank {rank} of {world}"
        require_divisible(micro_batches, world)
        # A cursor holds plain integers, so this is the fingerprint's first 60 bits.
        self.found = summary(shards.about)
        self.set_id = int(fingerprint(shards)[:15], 16)
        self.cursor = {**START, "set": self.set_id, **(cursor or {})}
        if self.cursor["set"] != self.set_id:
            raise UserError(
                f"data.shards: {shards.root} is not the shard set of the checkpoint; its content "
                "differs. Continue with the same set or choose another run.dir"
            )
        self.modality = modality
        self.plan = BatchPlan(
            [lengths_of(shards, entry) for entry in shards.shards],
            modality,
            seed=seed,
            size=size,
            micro_batches=micro_batches,
        )
        per_rank = micro_batches // world
        self.mine = range(rank * per_rank, (rank + 1) * per_rank)  # micro-batches of a step
        # If masks of equal length differ in number, each step's count is summed over the ranks.
        self.ahead: tuple[StepBatch, Callable[[], list[float]]] | None = None
        self.sums = RankSums(world if self.plan.masked is None else 1)
        self.planned: deque[Step] = deque()  # requested from the workers, not yet returned
        self.quarantine = quarantine or Quarantine()
        self.reader = Reader(shards, members_of(shards, modality))
        self.prefetcher = _Prefetcher(shards, self.plan) if shards.remote else None
        make = MicroBatches(self.reader, modality, seed)
        self.workers: LoaderWorkers | None = None
        self.made: Iterator[Made]
        if workers:
            self.workers = LoaderWorkers(
                make, self._lots(), workers, name=self.reader.name, patience=patience
            )
            self.made = self.workers
            if torch.cuda.is_available():
                self.made = map(Made.copied, self.workers)  # page-locked
        else:
            self.made = (make(lot, lambda sample_id: None) for lot in self._lots())

    @cached_property
    def stats(self) -> EpochStats:
        return self.plan.stats()

    def describe(self) -> str:
        """An epoch in one line."""
        stats = self.stats
        what = f"{stats.steps} steps, {stats.samples} samples"
        if self.modality.batch_unit != "samples":
            what += f", {stats.units:.4g} {self.modality.batch_unit}, {stats.padding:.1%} padding"
        remarks = self.modality.remarks(self.plan.counts)
        return "; ".join(filter(None, [what, *remarks, self.found]))

    def _lots(self) -> Iterator[Lot]:
        for step in self.plan.steps(self.cursor):
            self.planned.append(step)
            if self.prefetcher:
                self.prefetcher.at(step.cursor)
            for i in self.mine:
                masked = None if step.masked is None else step.masked[i]
                yield Lot(step.epoch, i, step.lots[i], step.spare[i], masked)

    def __iter__(self) -> Iterator[StepBatch]:
        return self

    def __next__(self) -> StepBatch:
        if self.plan.masked is not None:
            batch, _ = self._next_step()
        else:
            batch, pending = self.ahead or self._next_step()
            self.ahead = self._next_step()  # its count is summed during this step
            count = max(1, int(*pending()))  # random masks can be empty
            batch = dataclasses.replace(batch, count=count)
        self.cursor = batch.cursor
        return batch

    def _next_step(self) -> tuple[StepBatch, Callable[[], list[float]]]:
        """The next step, and a function that waits for its number of masked tokens, which the step
        already has if the plan knows it."""
        try:
            made = [next(self.made) for _ in self.mine]
            step = self.planned.popleft()  # of these lots: workers keep the order
            bad = [each for micro_batch in made for each in micro_batch.bad]
            self.quarantine.add(sum(len(step.lots[i]) for i in self.mine), bad)
        except (UserError, OSError):
            self.close()
            raise
        pending = self.sums.begin(sum(micro_batch.batch.terms for micro_batch in made))
        batch = StepBatch(
            modality=self.modality.name,
            micro_batches=[micro_batch.batch for micro_batch in made],
            count=sum(step.masked or ()),
            samples=sum(map(len, step.lots)),
            units=step.units,
            cursor={**step.cursor, "set": self.set_id},
            bad=Counter(each.kind for each in bad),
        )
        return batch, pending

    def close(self) -> None:
        """Ends the workers and closes the files; no further iteration is possible."""
        self.made = iter(())
        if self.prefetcher:
            self.prefetcher.close()
        if self.workers:
            self.workers.close()
        self.reader.close()


class _Prefetcher:
    """A thread that downloads the shards of a remote set before they are needed."""

    def __init__(self, shards: ShardSet, plan: BatchPlan) -> None:
        self.shards, self.plan = shards, plan
        self.pool: tuple[int, int] | None = None
        self.cursors: queue.SimpleQueue[Mapping[str, int] | None] = queue.SimpleQueue()
        threading.Thread(target=self._run, daemon=True).start()

    def at(self, cursor: Mapping[str, int]) -> None:
        """Called when reading reaches this cursor."""
        pool = cursor["epoch"], cursor["pool"]
        if pool != self.pool:
            self.pool = pool
            self.cursors.put(cursor)

    def _run(self) -> None:
        while cursor := self.cursors.get():
            # The reader that needs the shard reports the error.
            with contextlib.suppress(UserError, OSError):
                prefetch(self.shards, self.plan.upcoming(cursor))

    def close(self) -> None:
        self.cursors.put(None)


def members_of(shards: ShardSet, modality: Modality) -> list[str]:
    """The fields that the modality reads. Raises UserError if the set has none of them."""
    found = [key for key in modality.extensions if key in shards.fields]
    if not found:
        raise UserError(
            f"{shards.root}: its samples have no "
            f"{' or '.join(f'.{key}' for key in modality.extensions)} member (they have: "
            f"{', '.join(f'.{field}' for field in shards.fields)}), which modality "
            f"{modality.name} reads"
        )
    return found


def lengths_of(shards: ShardSet, entry: ShardEntry) -> npt.NDArray[np.uint32]:
    return np.frombuffer(lengths_for(shards, entry), np.uint32)
