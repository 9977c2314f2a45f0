"""A stream: tars at URLs, read a few at a time, of which nothing is known before they are there.

    URL-{000000..000127}.tar --this rank's part, shuffled--> groups --download, read headers-->
        a small set on this node's disk --an epoch of a Loader--> StepBatch, summed over the ranks

The fallback where nothing can be indexed: each rank draws from tars of its own, so what is in a
step depends on the number of ranks, ranks are not at the same place of an epoch, and a run goes on
with the next tars, not with the next sample. All that a Loader does with a set it does with a group
of tars: pools of like lengths, planned micro-batches, stand-ins for bad samples, workers.
"""

from __future__ import annotations

import dataclasses
import logging
import shutil
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from d2v_ds.batch import StepBatch
from d2v_ds.distributed import RankSums
from d2v_ds.errors import UserError
from d2v_ds.foreign import KINDS, Indexed, index_tar
from d2v_ds.loader import Loader
from d2v_ds.loader.plan import SHARD_ORDER, permutation
from d2v_ds.loader.quarantine import Quarantine
from d2v_ds.loader.reading import Bad
from d2v_ds.masking import bit_generator
from d2v_ds.modalities.base import Modality
from d2v_ds.preflight import require_divisible, require_tars
from d2v_ds.shard_cache import OwnFolder, download
from d2v_ds.shard_format import ShardSet

log = logging.getLogger("d2v_ds")

TOGETHER = 4  # tars of a group: a rank has two groups on the disk, one to read and one to come
GROUP_SEED = 17  # what the random numbers are for: beside those of plan.py and mixture.py
START = {"epoch": 0, "step": 0, "group": 0}  # steps in all; groups of the epoch begun by rank 0


class StreamLoader:
    """This rank's part of every optimizer step over tars at URLs, for ever: iterates StepBatch, as
    Loader, whose settings it shares.

    position: that of a StepBatch; what its group of tars has left is passed over. Raises UserError
    for fewer tars than ranks, a modality that headers tell nothing about, a tar that cannot be
    downloaded or is damaged, and what Loader raises.
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
        position: Mapping[str, int] | None = None,
        quarantine: Quarantine | None = None,
    ) -> None:
        require_divisible(micro_batches, world)
        require_tars(tars, modality.name, world)
        self.tars, self.modality, self.seed = tars, modality, seed
        self.rank, self.world, self.workers = rank, world, workers
        self.own = micro_batches // world
        self.size = size / world
        self.quarantine = quarantine or Quarantine()
        self.position = {**START, **(position or {})}
        if position:
            log.warning(
                "a stream does not go on exactly where it stopped: the rest of the tars that were "
                "being read, up to %d on each rank, is passed over",
                TOGETHER,
            )
        self.folder = OwnFolder()
        self.sums = RankSums(world)
        self.steps = self._steps()
        self.ahead: tuple[StepBatch, Callable[[], list[float]]] | None = None

    def describe(self) -> str:
        """What an epoch is, for people."""
        return (
            f"{len(self.tars)} tars without an index, {len(self.tars) / self.world:.4g} for each "
            "rank; what is in them shows as they come, and a resume is not exact"
        )

    def __iter__(self) -> Iterator[StepBatch]:
        return self

    def __next__(self) -> StepBatch:
        batch, sums = self.ahead or self._next_step()
        self.ahead = self._next_step()  # its sums are made while this step is taken
        masked, samples, units = sums()
        self.position = {**batch.position, "step": self.position["step"] + 1}
        return dataclasses.replace(
            batch,
            masked_count=max(1, int(masked)),
            samples=int(samples),
            units=units,
            position=self.position,
        )

    def _next_step(self) -> tuple[StepBatch, Callable[[], list[float]]]:
        try:
            batch = next(self.steps)
        except (UserError, OSError):
            self.close()
            raise
        return batch, self.sums.begin(batch.masked_count, batch.samples, batch.units)

    def _steps(self) -> Generator[StepBatch]:
        """Steps of this rank's micro-batches alone."""
        numbers = self._groups()
        place = next(numbers)
        upcoming = self._fetch(*place)
        while True:
            (epoch, group, _), found = place, upcoming.result()
            place = next(numbers)
            upcoming = self._fetch(*place)
            self.quarantine.add(len(found.left_out), found.left_out)
            seed = bit_generator(self.seed, GROUP_SEED, epoch, self.rank, group).random_raw()
            loader = Loader(
                found.shards,
                self.modality,
                seed=int(seed),
                size=self.size,
                micro_batches=self.own,
                workers=self.workers,
                quarantine=self.quarantine,
            )
            with closing(loader):
                for batch in islice(loader, loader.stats.steps):
                    yield self._as_part(batch, {"epoch": epoch, "group": group + 1})
            shutil.rmtree(found.shards.root)

    def _as_part(self, batch: StepBatch, position: dict[str, Any]) -> StepBatch:
        """With its micro-batches counted behind those of the ranks before this one."""
        first = self.rank * self.own
        micro_batches = [
            dataclasses.replace(each, index=first + each.index) for each in batch.micro_batches
        ]
        return dataclasses.replace(batch, micro_batches=micro_batches, position=position)

    def _groups(self) -> Iterator[tuple[int, int, list[int]]]:
        """(epoch, group, numbers of its tars), from the position on, for ever."""
        epoch, group = self.position["epoch"], self.position["group"]
        while True:
            order = permutation(len(self.tars), self.seed, SHARD_ORDER, epoch)
            own = order[self.rank :: self.world]
            for start in range(group * TOGETHER, len(own), TOGETHER):
                yield epoch, start // TOGETHER, own[start : start + TOGETHER].tolist()
            epoch, group = epoch + 1, 0

    def _fetch(self, epoch: int, group: int, numbers: list[int]) -> Future[_Group]:
        """Begins to make a set of some tars."""
        future: Future[_Group] = Future()

        def run() -> None:
            try:
                future.set_result(self._make_set(self.folder.path / f"{epoch}-{group}", numbers))
            except BaseException as error:  # for whoever waits for it
                future.set_exception(error)

        # A download that hangs must not keep the process from ending, as a pool's threads would.
        threading.Thread(target=run, daemon=True).start()
        return future

    def _make_set(self, folder: Path, numbers: list[int]) -> _Group:
        folder.mkdir()
        with ThreadPoolExecutor(TOGETHER) as pool:
            found = list(pool.map(lambda number: self._get(folder, number), numbers))
        kind = KINDS[self.modality.name]
        shards = ShardSet(
            folder,
            self.modality.name,
            kind.unit,
            0,  # each sample says its own
            kind.all_fields,
            tuple(tar.entry for tar in found if tar.entry.samples),
            urls={f"{number:06d}": self.tars[number] for number in numbers},
        )
        left_out = [
            Bad(-1, self.tars[number], key, reason)
            for number, tar in zip(numbers, found, strict=True)
            for key, reason in tar.left_out
        ]
        return _Group(shards, left_out)

    def _get(self, folder: Path, number: int) -> Indexed:
        """Downloads a tar, and reads its headers."""
        path = folder / f"{number:06d}.tar"
        download(self.tars[number], path)
        try:
            indexed = index_tar((path, self.modality.name, "none"))
        except UserError as error:
            raise UserError(str(error).replace(str(path), self.tars[number])) from None
        path.with_suffix(".idx").write_bytes(indexed.idx)
        return indexed

    def close(self) -> None:
        """Ends the workers and removes the tars; iterating is over."""
        self.steps.close()
        self.folder.close()


class _Group(NamedTuple):
    shards: ShardSet
    left_out: list[Bad]  # by their headers
