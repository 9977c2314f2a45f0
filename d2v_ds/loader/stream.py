"""Streaming of tars at URLs, a few at a time. Their contents are unknown in advance.

    URL-{000000..000127}.tar --this rank's part, shuffled--> groups --download, read headers-->
        a small set on this node's disk --an epoch of a Loader--> StepBatch, summed over the ranks

This is the fallback for tars that cannot be indexed. Each rank reads its own tars, so the content
of a step depends on the number of ranks, and ranks progress through an epoch independently. On
resume, a run continues with the group of tars after the one that rank 0 was reading; some samples
of that epoch are repeated and some are skipped. A Loader reads each group of tars as it would read
a set, with the same pools of similar lengths, planned micro-batches, replacements of bad samples
and workers.
"""

from __future__ import annotations

import dataclasses
import logging
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import closing
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from d2v_ds.batch import StepBatch
from d2v_ds.config.config import require_divisible
from d2v_ds.data.cache.folder import OwnFolder
from d2v_ds.data.cache.private import writing
from d2v_ds.data.download import download
from d2v_ds.data.shard_format import ShardSet
from d2v_ds.data.tar_index import IndexedTar, index_tar
from d2v_ds.distributed.collectives import RankSums
from d2v_ds.errors import UserError
from d2v_ds.loader.find_set import require_tars
from d2v_ds.loader.loader import Loader
from d2v_ds.loader.plan import require_room
from d2v_ds.loader.quarantine import Quarantine
from d2v_ds.loader.reading import BadSample
from d2v_ds.modalities import sample_formats
from d2v_ds.modalities.base import Modality
from d2v_ds.secrets import mask
from d2v_ds.seeding import SHARD_ORDER, TAR_GROUP, bit_generator, permutation

log = logging.getLogger("d2v_ds")

GROUP_TARS = 4  # maximum number of tars in a group; a rank has two groups on disk
LONGEST = 2**31 - 1  # maximum length of a sample
START = {"epoch": 0, "step": 0, "group": 0}  # step: in total; group: the next one of rank 0

T = TypeVar("T")


class StreamLoader:
    """Iterates this rank's part of every optimizer step over tars at URLs, endlessly: StepBatch.
    The settings are those of Loader.

    cursor: of a StepBatch; the rest of its group of tars is skipped. Raises UserError if there are
    fewer tars than ranks, if the modality has no header readers, or if settings conflict; while
    iterating, if a tar cannot be downloaded or is damaged, if an epoch has less than one step, or
    if too many samples cannot be used; and the errors of LoaderWorkers.
    """

    def __init__(
        self,
        tars: Sequence[str],
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
    ) -> None:
        require_divisible(micro_batches, world)
        require_tars(tars, world)
        if not modality.header_readers:
            raise UserError(
                f"data.shards: {mask(tars[0])} has no index, and modality {modality.name} cannot "
                "read lengths from headers; make a shard set of its tars first"
            )
        require_room(modality, size, micro_batches, modality.cost(LONGEST))
        self.tars, self.modality, self.seed = tars, modality, seed
        [self.form] = sample_formats(modality.name)
        self.rank, self.world, self.workers = rank, world, workers
        self.own = micro_batches // world
        self.size = size / world
        self.quarantine = quarantine or Quarantine()
        self.cursor = {**START, **(cursor or {})}
        if self.cursor["step"]:
            log.warning(
                "%s and %d more tars: a stream does not resume exactly. The rest of the tars that "
                "rank 0 was reading is skipped; some samples of other ranks may be repeated or "
                "skipped in this epoch",
                mask(tars[0]),
                len(tars) - 1,
            )
        self.folder = OwnFolder()
        self.sums = RankSums(world)
        self.groups = map(self._fetch, self._groups())
        self.upcoming = next(self.groups)
        self.skipped = ""  # the reason for which the last group was skipped
        self.steps = self._steps()
        self.ahead: tuple[StepBatch, Callable[[], list[float]]] | None = None

    def describe(self) -> str:
        """One line about an epoch."""
        return (
            f"{len(self.tars)} tars without an index, {len(self.tars) / self.world:.4g} per rank; "
            "their contents are unknown in advance, and a resume is not exact"
        )

    def __iter__(self) -> Iterator[StepBatch]:
        return self

    def __next__(self) -> StepBatch:
        batch, sums = self.ahead or self._next_step()
        self.ahead = self._next_step()  # it is summed over the ranks during this step
        masked, samples, units = sums()
        self.cursor = {**batch.cursor, "step": self.cursor["step"] + 1}
        return dataclasses.replace(
            batch,
            count=max(1, int(masked)),
            samples=int(samples),
            units=units,
            cursor=self.cursor,
        )

    def _next_step(self) -> tuple[StepBatch, Callable[[], list[float]]]:
        try:
            batch = next(self.steps)
        except (UserError, OSError):
            self.close()
            raise
        return batch, self.sums.begin(batch.count, batch.samples, batch.units)

    def _steps(self) -> Generator[StepBatch]:
        """Steps of the micro-batches of this rank only."""
        last_step = self.upcoming.epoch  # the epoch of the last step
        while True:
            group, self.upcoming = self.upcoming, next(self.groups)
            if group.epoch > last_step + 1:
                raise UserError(
                    f"data.shards: an epoch of {len(self.tars)} tars for {self.world} ranks has "
                    f"less than one step on rank {self.rank} ({self.skipped})"
                )
            shards, left_out = self._set_of(group)
            bad = Counter(each.kind for each in left_out)
            for batch in self._steps_of(group, shards):
                last_step = group.epoch
                yield dataclasses.replace(batch, bad=Counter(batch.bad) + bad)
                bad = Counter()
            self.quarantine.add(len(left_out), left_out, "it is left out")
            shutil.rmtree(group.folder)

    def _steps_of(self, group: _Group, shards: ShardSet) -> Iterator[StepBatch]:
        """One epoch of a set; nothing if it has less than one step."""
        seed = bit_generator(self.seed, TAR_GROUP, group.epoch, self.rank, group.number)
        try:
            if not shards.shards:
                raise UserError("they have no usable sample")
            loader = Loader(
                shards,
                self.modality,
                seed=int(seed.random_raw()),
                size=self.size,
                micro_batches=self.own,
                workers=self.workers,
                quarantine=self.quarantine,
            )
        except UserError as error:
            self.skipped = str(error)
            tars = ", ".join(mask(self.tars[number]) for number in group.tars)
            log.warning("%s: skipped: %s", tars, error)
            return
        first = self.rank * self.own  # the index of its first micro-batch in the step
        with closing(loader):
            for batch in islice(loader, loader.stats.steps):
                yield dataclasses.replace(
                    batch,
                    micro_batches=[
                        dataclasses.replace(each, index=first + each.index)
                        for each in batch.micro_batches
                    ],
                    cursor={"epoch": group.epoch, "group": group.number + 1},
                )

    def _groups(self) -> Iterator[tuple[int, int, list[int]]]:
        """(epoch, group, numbers of its tars), endlessly, starting at the cursor."""
        epoch, first = self.cursor["epoch"], self.cursor["group"]
        while True:
            order = permutation(len(self.tars), self.seed, SHARD_ORDER, epoch)
            own = order[self.rank :: self.world]
            groups = np.array_split(own, -(-len(own) // GROUP_TARS))
            for number in range(first, len(groups)):
                yield epoch, number, groups[number].tolist()
            epoch, first = epoch + 1, 0

    def _fetch(self, group: tuple[int, int, list[int]]) -> _Group:
        """Starts the download of a group."""
        epoch, number, tars = group
        folder = self.folder.path / f"{epoch}-{number}"
        folder.mkdir()
        found = [in_background(partial(self._get, folder, tar)) for tar in tars]
        return _Group(epoch, number, tars, folder, found)

    def _get(self, folder: Path, number: int) -> IndexedTar:
        """Downloads a tar and reads its headers."""
        path = folder / f"{number:06d}.tar"
        with writing(folder):
            download(self.tars[number], path)
            try:
                # Sample rates are not compared here: decoding compares each with the setting.
                indexed = index_tar((path, self.form, "none"), one_rate=False)
            except UserError as error:
                raise UserError(str(error).replace(str(path), mask(self.tars[number]))) from None
            path.with_suffix(".idx").write_bytes(indexed.idx)
        return indexed

    def _set_of(self, group: _Group) -> tuple[ShardSet, list[BadSample]]:
        """Waits for a group. Returns it as a set, and the samples that are not in the set."""
        found = [future.result() for future in group.found]
        shards = ShardSet(
            group.folder,
            self.modality.name,
            self.form.length_unit,
            0,  # unknown; each sample has its own
            self.form.fields,
            tuple(tar.entry for tar in found if tar.entry.samples),
            urls={f"{number:06d}": mask(self.tars[number]) for number in group.tars},
        )
        left_out = [
            BadSample(-1, mask(self.tars[number]), key, reason, kind)
            for number, tar in zip(group.tars, found, strict=True)
            for key, reason, kind in tar.left_out
        ]
        return shards, left_out

    def close(self) -> None:
        """Ends the workers and removes the tars. Iteration is over."""
        self.steps.close()
        self.folder.close()


class _Group(NamedTuple):
    """Tars that are read and shuffled together."""

    epoch: int
    number: int
    tars: list[int]
    folder: Path
    found: list[Future[IndexedTar]]


def in_background(work: Callable[[], T]) -> Future[T]:
    """Runs it in a thread that, unlike those of a pool, does not keep the process from ending."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # raised by `result`
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future
