"""The loader: shards -> plan -> samples -> decode -> collate -> StepBatch.

    plan.py     ShardSet --lengths--> Plan.steps(position): which samples make which micro-batch
    reading.py  worker processes: Reader.read -> modality.decode -> modality.collate -> Batch
    Loader      in the plan's order: this rank's micro-batches of a step, with the position after it

Ranks take contiguous parts of each step's micro-batches and workers take whole micro-batches, so
neither changes what is in them, and a run goes on from a position on any number of either.
"""

from __future__ import annotations

import atexit
import dataclasses
import multiprocessing
import os
import pickle
import signal
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from multiprocessing.process import BaseProcess
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from d2v_ds.batch import Batch, StepBatch
from d2v_ds.distributed import STOP_SIGNALS, die_with_parent
from d2v_ds.errors import UserError
from d2v_ds.loader.plan import START, EpochStats, Plan, Step
from d2v_ds.loader.reading import Lot, MicroBatches, Reader
from d2v_ds.modalities.base import Modality
from d2v_ds.preflight import require_divisible
from d2v_ds.shard_format import ShardSet, fingerprint, read_index

__all__ = ["EpochStats", "Loader", "read_samples"]

PREFETCH = 2  # micro-batches that a worker makes ahead
SMALL_SHM = 1 << 30  # bytes free in /dev/shm below which batches travel through pipes


class Loader:
    """This rank's part of every optimizer step over a shard set, for ever: iterates StepBatch.

    size: of a whole step, in the modality's unit. workers: processes that decode ahead, 0 to decode
    in this one; they are forked here, so make the Loader before CUDA is in use. position: that of a
    StepBatch, to go on after it. Raises UserError when the settings do not fit each other or the
    set, or the set is another one than that of `position`; while iterating, when a sample cannot be
    used. Where the number of masked tokens is drawn (Modality.masked_tokens), the ranks add theirs
    up, and take every step together.

    Several modalities, one a step, are a layer above: a Loader each, and a pure function of (seed,
    step) that says whose turn it is on all ranks.
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
        position: Mapping[str, int] | None = None,
    ) -> None:
        assert 0 <= rank < world, f"rank {rank} of {world}"
        require_divisible(micro_batches, world)
        # A position holds plain integers, so this is the fingerprint's first 60 bits.
        self.set = int(fingerprint(shards)[:15], 16)
        self.position = {**START, "set": self.set, **(position or {})}
        if self.position["set"] != self.set:
            raise UserError(
                f"data.shards: {shards.root} is not the shard set of the checkpoint, its content "
                "differs. Go on with the same set or choose another run.dir"
            )
        self.modality = modality
        self.plan = Plan(
            [_lengths(shards, i) for i in range(len(shards.shards))],
            modality,
            seed=seed,
            size=size,
            micro_batches=micro_batches,
        )
        mine = micro_batches // world
        self.mine = range(rank * mine, (rank + 1) * mine)  # of the micro-batches of every step
        # In the first whole epoch every sample is read, by some rank: checksums are compared until
        # its end.
        self.verified_epoch = self.position["epoch"] + (self.position["step"] > 0)
        # Where masks of one length differ in their number, steps count theirs over all ranks.
        self.ahead: tuple[StepBatch, Callable[[], int]] | None = None
        self.group: Any = None
        if self.plan.masked is None and world > 1:
            self.group = dist.new_group(backend="gloo")  # never waits for a GPU, or for others
        self.planned: deque[Step] = deque()  # asked of the workers and not yet given out
        self.reader = Reader(shards, [_member(shards, modality)])
        source = MicroBatches(self.reader, modality, seed, by_pipe=workers > 0 and _shm_is_small())
        self.batches, self.processes = _start(source, self._lots(), workers)
        # Not left to multiprocessing, whose exit waits for workers after a SIGTERM they ignore.
        atexit.register(self.close)

    @cached_property
    def stats(self) -> EpochStats:
        return self.plan.stats()

    def _lots(self) -> Iterator[Lot]:
        for step in self.plan.steps(self.position):
            self.planned.append(step)
            verify = step.epoch <= self.verified_epoch
            for i in self.mine:
                masked = None if step.masked is None else step.masked[i]
                yield Lot(step.epoch, i, step.lots[i], masked, verify)

    def __iter__(self) -> Iterator[StepBatch]:
        return self

    def __next__(self) -> StepBatch:
        if self.plan.masked is not None:
            batch, _ = self._next_step()
        else:
            batch, count = self.ahead or self._next_step()
            self.ahead = self._next_step()  # its count is summed while this step is taken
            batch = dataclasses.replace(batch, masked_count=max(1, count()))
        self.position = batch.position
        return batch

    def _next_step(self) -> tuple[StepBatch, Callable[[], int]]:
        """The next step, and what waits for its number of masked tokens, which is in it already
        where the plan knows it."""
        micro_batches = [self._take() for _ in self.mine]
        step = self.planned.popleft()
        count = self._sum_ranks(sum(len(batch.masked) for batch in micro_batches))
        batch = StepBatch(
            modality=self.modality.name,
            micro_batches=micro_batches,
            masked_count=sum(step.masked or ()),
            samples=sum(map(len, step.lots)),
            units=step.units,
            position={**step.position, "set": self.set},
        )
        return batch, count

    def _sum_ranks(self, number: int) -> Callable[[], int]:
        """Begins to add up a number over the ranks, on the host; the result, when called."""
        if self.group is None:
            return lambda: number
        total = torch.tensor(number, dtype=torch.int64)
        work = dist.all_reduce(total, group=self.group, async_op=True)

        def result() -> int:
            work.wait()
            return int(total)

        return result

    def _take(self) -> Batch:
        item = next(self.batches)
        if isinstance(item, UserError):
            self.close()
            raise item
        if isinstance(item, bytes):
            item = pickle.loads(item)
            item = item.pin_memory() if torch.cuda.is_available() else item
        assert isinstance(item, Batch)
        return item

    def close(self) -> None:
        """Ends the workers and closes the files; iterating is over."""
        atexit.unregister(self.close)
        self.batches = iter(())  # torch's iterator ends its workers when it is let go
        for process in self.processes:
            if process.is_alive():  # stuck, for example in a file system that does not answer
                process.kill()
        self.processes = []
        self.reader.close()


def read_samples(shards: ShardSet, keys: Sequence[str]) -> Iterator[tuple[str, dict[str, bytes]]]:
    """(key, members) of every sample of a set, in its order; those of `keys` that the set has.

    Raises UserError for a sample whose bytes have changed.
    """
    reader = Reader(shards, [key for key in keys if key in shards.fields])
    try:
        for position in range(shards.samples):
            try:
                members = reader.read(position, verify=True)
            except UserError:
                raise
            except ValueError as error:
                raise reader.error(position, error) from None
            yield reader.key(position), members
    finally:
        reader.close()


def _member(shards: ShardSet, modality: Modality) -> str:
    """The member that the modality reads. Raises UserError when the set has none that it can."""
    for key in modality.keys:
        if key in shards.fields:
            return key
    raise UserError(
        f"{shards.root}: its samples have no {' or '.join(f'.{key}' for key in modality.keys)} "
        f"member (they have: {', '.join(f'.{field}' for field in shards.fields)}), which "
        f"modality {modality.name} reads"
    )


def _lengths(shards: ShardSet, shard: int) -> np.ndarray[Any, np.dtype[np.uint32]]:
    """Of one shard's samples. Raises UserError."""
    entry = shards.shards[shard]
    index = read_index(shards.index(entry))
    if (index.count, index.bytes) != (entry.samples, entry.bytes):
        raise UserError(
            f"{shards.index(entry)}: does not belong to its tar ({index.count} samples and "
            f"{index.bytes} bytes, expected {entry.samples} and {entry.bytes}); convert again"
        )
    return np.frombuffer(index.lengths, np.uint32).copy()  # lets go of the rest of the index


def _start(
    source: MicroBatches, lots: Iterator[Lot], workers: int
) -> tuple[Iterator[Any], list[BaseProcess]]:
    """The micro-batches in the order of `lots`, made ahead by so many processes, and these."""
    loader = DataLoader(
        source,
        sampler=lots,
        batch_size=None,
        collate_fn=_same,
        num_workers=workers,
        prefetch_factor=PREFETCH if workers else None,
        # A forked process shares what is in memory, and its queues have no named semaphores in
        # /dev/shm that would outlive a crash.
        multiprocessing_context="fork" if workers else None,
        worker_init_fn=_begin_worker if workers else None,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # torch draws a seed for the workers: not from the global one
    )
    before = multiprocessing.active_children()
    # A signal to stop, which launchers send to every process, is for the trainer: it needs its
    # workers to finish the step and save. They inherit this mask and keep it.
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        with warnings.catch_warnings():
            # Forking beside threads can deadlock a child that needs their locks. These need none.
            warnings.simplefilter("ignore", DeprecationWarning)
            batches = iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    return batches, [p for p in multiprocessing.active_children() if p not in before]


def _same(item: Any) -> Any:
    return item


def _begin_worker(worker: int) -> None:
    """Runs in each worker first."""
    if sys.platform == "linux":
        die_with_parent()
    parent = multiprocessing.parent_process()
    if parent is None or os.getppid() != parent.pid:  # it ended before the call above
        os._exit(1)


def _shm_is_small() -> bool:
    """Whether /dev/shm, through which torch hands over tensors, might not do (in containers)."""
    try:
        space = os.statvfs("/dev/shm")
    except OSError:
        return True
    return space.f_bavail * space.f_frsize < SMALL_SHM
