"""Shard sets and third-party tars as pipelines of the package webdataset.

    shards -> pipeline of samples: {"__key__", "__url__", members, "example"}

The pipeline reads the tars from front to back, so it suits other trainers, inspection and feature
extraction; training reads single members by the index (reading.py). The package webdataset itself
stops silently at the first damaged header and skips links. Here tar_scan.py reads the tars, those
of a set are checked against its index, sample by sample, and tars without an index are downloaded
and scanned before they are read.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from d2v_ds.data import npy
from d2v_ds.data.cache.folder import OwnFolder
from d2v_ds.data.cache.private import writing
from d2v_ds.data.cache.remote import open_shard
from d2v_ds.data.cache.renew import index_for, origin, renew_tar
from d2v_ds.data.checksum import checksum_of
from d2v_ds.data.download import download
from d2v_ds.data.headers import payload
from d2v_ds.data.shard_format import ShardEntry, ShardSet
from d2v_ds.data.shard_index import ShardIndex
from d2v_ds.data.tar_scan import DamagedTar, members, samples
from d2v_ds.errors import UserError
from d2v_ds.loader.find_set import find_set, stream_tars
from d2v_ds.modalities import modality_class
from d2v_ds.modalities.base import Modality
from d2v_ds.secrets import mask

if TYPE_CHECKING:
    import webdataset as wds

log = logging.getLogger("d2v_ds")

Item = dict[str, Any]
Handler = Callable[[Exception], bool]


def webdataset(
    shards: str | Path | ShardSet,
    modality: str | Modality,
    *,
    decode: bool = True,
    shuffle: int = 0,
    seed: int = 0,
    handler: Handler | None = None,
) -> wds.DataPipeline:
    """The samples of a shard set or of tars, as a webdataset pipeline that can be extended
    (`.map`, `.batched` ...) and given to a DataLoader.

    shards: a set, its folder or URL prefix, `pipe:COMMAND {}`, a folder of third-party tars, or
    tars at URLs (`https://host/a-{000..127}.tar`). modality: a modality, or the name of one for its
    default settings. An item has the bytes of all members; decode: and the sample as "example", as
    `modality.decode(members, None)` returns it. shuffle: the number of samples in the shuffle
    buffer, with which the order of the tars is shuffled as well; 0: the order of the set. handler:
    called with the UserError of a sample or tar that is damaged; it returns whether to skip it and
    continue. None: the error is raised.

    Every sample occurs once per pass: each tar is read by one worker of one rank. The order of
    shuffled samples changes with each pass; in DataLoader workers only with
    persistent_workers=True. Raises UserError if there is no such set.
    """
    import webdataset as wds

    handler = handler or wds.reraise_exception
    name = modality if isinstance(modality, str) else modality.name
    packed = (
        modality_class(name).packed_extensions
        if isinstance(modality, str)
        else modality.packed_extensions
    )
    tars = [] if isinstance(shards, ShardSet) else stream_tars(str(shards))
    about: Mapping[str, Any] = {}
    if tars:
        read: Callable[[Iterable[Item]], Iterator[Item]] = _TarsAtUrls(packed, handler)
    else:
        found = shards if isinstance(shards, ShardSet) else find_set(shards, name)
        if found.modality != name:
            raise UserError(f"{found.root}: holds {found.modality}, not {name}")
        tars, about = [entry.name for entry in found.shards], found.about
        read = _TarsOfSet(found, packed, handler)
    stages: list[Any] = [wds.SimpleShardList(tars), wds.split_by_node, wds.split_by_worker]
    stages += [wds.detshuffle(len(tars), len(tars), seed)] if shuffle else []
    stages += [read]
    stages += [wds.detshuffle(shuffle, shuffle, seed)] if shuffle else []
    pipeline = wds.FluidWrapper(stages[0]).compose(*stages[1:])
    if decode:
        if isinstance(modality, str):
            kind = modality_class(modality)
            modality = kind(kind.Config())
        modality.check_set(about)
        pipeline = pipeline.map(_Decode(modality), handler=handler)
    return pipeline


@dataclass(frozen=True)
class _Decode:
    """Adds the example to an item."""

    modality: Modality

    def __call__(self, item: Item) -> Item:
        members = {name: value for name, value in item.items() if not name.startswith("__")}
        wanted = self.modality.extensions
        try:
            if not members.keys() & set(wanted):
                raise ValueError(f"has only {', '.join(members)}, none of {', '.join(wanted)}")
            return {**item, "example": self.modality.decoded(members, None)}
        except ValueError as error:
            raise UserError(f"{_name(item)}: {error}") from None


def _name(item: Item) -> str:
    return f"{mask(item['__url__'])}, sample {item['__key__']!r}"


@dataclass(frozen=True)
class _TarsOfSet:
    """Names of shards -> items, each compared with the index."""

    shards: ShardSet
    packed: Mapping[str, str]
    handler: Handler

    def __call__(self, sources: Iterable[Item]) -> Iterator[Item]:
        entries = {entry.name: entry for entry in self.shards.shards}
        for source in sources:
            try:
                yield from self._read(entries[source["url"]])
            except UserError as error:
                if not self.handler(error):
                    return

    def _read(self, entry: ShardEntry) -> Iterator[Item]:
        """A copy of a set (cache, D2V_STAGE) that has been damaged on the disk is replaced, once,
        and read on from where it was damaged."""
        tar = origin(self.shards, entry) or str(self.shards.tar(entry))
        index = index_for(self.shards, entry)
        first, renewed = 0, not self.shards.is_copy
        while True:
            with self._open(entry) as file:
                try:
                    for row, item in self._items(file, tar, index, first):
                        error = _fault_of(item, index, row)
                        if error and (not renewed or not self.handler(error)):
                            raise error
                        first = row + 1
                        if not error:
                            yield item
                    return
                except UserError as error:
                    if renewed:
                        raise
                    renewed = True
                    self._renew(entry, file, error)

    def _items(
        self, file: BinaryIO, tar: str, index: ShardIndex, first: int
    ) -> Iterator[tuple[int, Item]]:
        """(row of the index, item) of the rows from `first` on. Raises UserError."""
        row = 0
        for item in items_of(file, tar, self.packed):
            # The index of third-party tars leaves out samples without a usable length.
            if row == index.count or item["__key__"] != index.key(row):
                continue
            if row >= first:
                yield row, item
            row += 1
        if row < index.count:
            raise UserError(
                f"{tar}: is damaged: sample {index.key(row)!r} of its index is missing. Copy the "
                "shard again or convert again"
            )

    def _renew(self, entry: ShardEntry, file: BinaryIO, error: UserError) -> None:
        log.warning("%s", error)
        try:
            renew_tar(self.shards, entry, file.fileno())
        except UserError as reason:
            log.warning("this copy could not be replaced (%s)", reason)

    def _open(self, entry: ShardEntry) -> BinaryIO:
        if self.shards.remote:
            return open(open_shard(self.shards, entry), "rb")
        tar = self.shards.tar(entry)
        try:
            return tar.open("rb")
        except OSError as error:
            raise UserError(f"{tar}: cannot be read ({error.strerror})") from None


def _fault_of(item: Item, index: ShardIndex, row: int) -> UserError | None:
    """An error unless the members are those of the index."""
    checksum = checksum_of(index.checksum)
    for column, field in enumerate(index.fields):
        i = row * len(index.fields) + column
        if not index.offsets[i]:
            continue
        member = item.get(field, b"")
        same = checksum is None or checksum(member) == index.checksums[i]
        if len(member) != index.sizes[i] or not same:
            return UserError(
                f"{_name(item)}: its .{field} has changed since it was indexed. Copy the shard "
                "again or convert again"
            )
    return None


@dataclass(frozen=True)
class _TarsAtUrls:
    """URLs of tars without an index -> items. Each tar is downloaded, scanned, read and removed."""

    packed: Mapping[str, str]
    handler: Handler

    def __call__(self, sources: Iterable[Item]) -> Iterator[Item]:
        with closing(OwnFolder()) as folder:
            for source in sources:
                try:
                    yield from self._read(source["url"], folder.path)
                except UserError as error:
                    if not self.handler(error):
                        return

    def _read(self, url: str, folder: Path) -> Iterator[Item]:
        path = folder / "downloaded.tar"
        with writing(folder):
            download(url, path)
        with path.open("rb") as file:
            try:
                for _ in members(file):
                    pass
            except DamagedTar as error:
                raise UserError(f"{mask(url)}: {error}; copy it again") from None
            file.seek(0)
            yield from items_of(file, url, self.packed)


def items_of(file: BinaryIO, tar: str, packed: Mapping[str, str]) -> Iterator[Item]:
    """The samples of an open tar, grouped as webdataset does. Unlike webdataset, also those after
    the first of several concatenated archives, and with links; a packed member yields one item per
    row."""
    try:
        for key, group in samples(members(file)):
            item: Item = {"__key__": key, "__url__": tar}
            item |= {name: payload(file, one) for name, one in group.items() if not one.problem}
            yield from _rows(item, packed)
    except (OSError, ValueError) as error:
        raise UserError(f"{mask(tar)}: is damaged ({error}); copy it again") from None


def _rows(item: Item, packed: Mapping[str, str]) -> Iterator[Item]:
    for extension in set(packed.values()) & item.keys():
        data = item[extension]
        try:
            found = npy.header_of(data, dimensions=2)
        except ValueError:  # not packed, or damaged: then decoding it says why
            continue
        n, block = found.shape
        width = block * npy.WIDTHS[found.kind]
        for i in range(n):
            start = found.start + i * width
            yield {
                "__key__": f"{item['__key__']}/{i}",
                "__url__": item["__url__"],
                found.kind[1] + str(8 * npy.WIDTHS[found.kind]): data[start : start + width],
            }
        return
    yield item
