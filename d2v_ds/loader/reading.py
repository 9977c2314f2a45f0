"""Reading: sample id -> members, and the samples of a micro-batch -> Batch.

Runs in the loader's worker processes, or in the training process if there are none. A member is
read with one os.pread at its offset in the index; tars are never scanned.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

from d2v_ds.batch import Batch
from d2v_ds.data.answer import register_schemes, registered_schemes
from d2v_ds.data.cache.remote import open_shard
from d2v_ds.data.cache.renew import index_for, origin, renew_tar
from d2v_ds.data.checks import Unusable, kind_of
from d2v_ds.data.checksum import Checksum, checksum_of
from d2v_ds.data.shard_format import ShardSet
from d2v_ds.data.shard_index import ShardIndex
from d2v_ds.errors import UserError
from d2v_ds.loader.plan import SampleIds
from d2v_ds.modalities.base import Modality
from d2v_ds.seeding import CROP, MASK, generator

log = logging.getLogger("d2v_ds")

OPEN_SHARDS = 64  # kept open by a reader, each with its index
REMEDY = "Copy the shard again or convert again; `d2v-shards verify` lists every fault of a set"


@dataclass(frozen=True, slots=True)
class _OpenShard:
    file: int
    index: ShardIndex
    columns: list[tuple[int, str]]  # (column in the index, field) of the fields to read
    width: int  # columns of the index
    checksum: Checksum | None


class Reader:
    """Reads samples of a set by id. fields: the members to read. verify: compare checksums at every
    read."""

    def __init__(self, shards: ShardSet, fields: Sequence[str], verify: bool = True) -> None:
        self.shards, self.fields, self.verify = shards, frozenset(fields), verify
        self.bounds = list(accumulate((shard.samples for shard in shards.shards), initial=0))
        self.open: OrderedDict[int, _OpenShard] = OrderedDict()  # least recent first
        self.renewed = dict[int, str]()  # {shard of a copy with damage: what its source has}

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "schemes": registered_schemes()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Workers, which may have to download, get the schemes of the trainer."""
        register_schemes(state.pop("schemes"))
        vars(self).update(state)

    def read(self, sample_id: int) -> dict[str, bytes]:
        """The members among `fields` that the sample has. Raises ValueError if their bytes have
        changed since they were indexed, UserError if the shard cannot be read.

        A copy of a set (cache, D2V_STAGE) may have been damaged on the disk: then its tar is
        replaced, once, and the sample is read again.
        """
        shard, row = self._locate(sample_id)
        try:
            one = self._opened(shard)
            index, members = one.index, {}
            for column, field in one.columns:
                i = row * one.width + column
                offset, size = index.offsets[i], index.sizes[i]
                if not offset:  # the sample has no such member
                    continue
                member = members[field] = os.pread(one.file, size, offset)
                if len(member) < size:
                    raise Unusable("truncated", f"the tar ends within its .{field}")
                if one.checksum and one.checksum(member) != index.checksums[i]:
                    raise Unusable(
                        "damaged",
                        f"its .{field} has changed: the index has another checksum for it",
                    )
            return members
        except (Unusable, OSError) as error:
            self._renew(shard, sample_id, error)
        return self.read(sample_id)

    def _renew(self, shard: int, sample_id: int, error: Unusable | OSError) -> None:
        """Replaces the tar of a copy because of an error. Raises the error if that cannot help."""
        if not self.shards.is_copy:
            raise self._unreadable(shard, error) if isinstance(error, OSError) else error
        if isinstance(error, OSError):
            error = Unusable("unreadable", f"cannot be read ({error.strerror})")
        if shard not in self.renewed:
            entry = self.shards.shards[shard]
            log.warning("%s", self.bad(sample_id, error))
            self.renewed[shard] = f"{origin(self.shards, entry)} has the same bytes"
            try:
                if renew_tar(self.shards, entry, self.open[shard].file):
                    os.close(self.open.pop(shard).file)
                    return
            except UserError as reason:
                log.warning("%s", reason)
                self.renewed[shard] = f"this copy could not be replaced ({reason})"
        raise Unusable(error.kind, f"{error}; {self.renewed[shard]}")

    def key(self, sample_id: int) -> str:
        shard, row = self._locate(sample_id)
        return self._opened(shard).index.key(row)

    def length(self, sample_id: int) -> int:
        shard, row = self._locate(sample_id)
        return int(self._opened(shard).index.lengths[row])

    def bad(self, sample_id: int, error: ValueError) -> BadSample:
        entry = self.shards.shards[self._locate(sample_id)[0]]
        tar = self.shards.urls.get(entry.name) or str(self.shards.tar(entry))
        return BadSample(sample_id, tar, self.key(sample_id), str(error), kind_of(error))

    def name(self, sample_id: int) -> str:
        """A sample in messages: its tar and its key."""
        return str(self.bad(sample_id, ValueError())).removesuffix(": ")

    def close(self) -> None:
        while self.open:
            os.close(self.open.popitem()[1].file)

    def _locate(self, sample_id: int) -> tuple[int, int]:
        """(shard, row in the shard)."""
        shard = bisect_right(self.bounds, sample_id) - 1
        return shard, sample_id - self.bounds[shard]

    def _opened(self, shard: int) -> _OpenShard:
        one = self.open.get(shard)
        if one:
            self.open.move_to_end(shard)
            return one
        if len(self.open) == OPEN_SHARDS:
            os.close(self.open.popitem(last=False)[1].file)
        entry = self.shards.shards[shard]
        index = index_for(self.shards, entry)
        columns = [(i, name) for i, name in enumerate(index.fields) if name in self.fields]
        checksum = checksum_of(index.checksum) if self.verify else None
        try:
            if self.shards.remote:
                file = open_shard(self.shards, entry)
            else:
                file = os.open(self.shards.tar(entry), os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise self._unreadable(shard, error) from None
        one = self.open[shard] = _OpenShard(file, index, columns, len(index.fields), checksum)
        return one

    def _unreadable(self, shard: int, error: OSError) -> UserError:
        tar = self.shards.tar(self.shards.shards[shard])
        return UserError(f"{tar}: cannot be read ({error.strerror})")


def read_samples(shards: ShardSet, fields: Sequence[str]) -> Iterator[tuple[str, dict[str, bytes]]]:
    """(key, members) of every sample of a set, in the order of the set, with the members among
    `fields` that it has. Raises UserError for a sample whose bytes have changed."""
    reader = Reader(shards, fields)
    try:
        for sample_id in range(shards.samples):
            try:
                members = reader.read(sample_id)
            except UserError:
                raise  # of the shard
            except ValueError as error:
                raise UserError(f"{reader.bad(sample_id, error)}. {REMEDY}") from None
            yield reader.key(sample_id), members
    finally:
        reader.close()


def label_of(meta: Mapping[str, Any], column: str) -> str | int | float:
    """The label of a sample. meta: its .json. Raises ValueError if it has none, or if the label is
    not text or a number, as null and NaN are not."""
    if column not in meta:
        raise ValueError(
            f"its .json has no {column!r} (it has: {', '.join(sorted(meta)) or 'nothing'})"
        )
    label = meta[column]
    if not isinstance(label, str | int | float) or (isinstance(label, float) and math.isnan(label)):
        raise Unusable("label", f"its {column!r} is {json.dumps(label)}, expected text or a number")
    return label


@dataclass(frozen=True)
class Lot:
    """What a worker needs to make one micro-batch."""

    epoch: int
    index: int  # of the micro-batch in its step
    samples: SampleIds
    spare: SampleIds
    masked: int | None  # the planned number of masked tokens; None: not planned


@dataclass(frozen=True)
class BadSample:
    """A sample that cannot be used."""

    sample_id: int
    tar: str
    key: str
    reason: str
    kind: str = "other"  # in LEFT_OUT of data/checks.py

    def __str__(self) -> str:
        return f"{self.tar}, sample {self.key!r}: {self.reason}"


class Made(NamedTuple):
    """A micro-batch, and which of its samples were replaced."""

    batch: Batch
    bad: tuple[BadSample, ...]

    def copied(self) -> Made:
        return self._replace(batch=self.batch.copied())


class MicroBatches:
    """Lot -> Made. Crops and masks are drawn from (seed, epoch, sample).

    A bad sample is replaced by the one before it in the lot, which is at least as long, cut to the
    planned length; else by the nearest one after it, repeated; else by a spare one. So sizes and
    numbers of masked tokens stay as planned, and nothing depends on ranks or workers.
    """

    def __init__(self, reader: Reader, modality: Modality, seed: int) -> None:
        self.reader, self.modality, self.seed = reader, modality, seed

    def __call__(self, lot: Lot, reading: Callable[[int], None]) -> Made:
        """reading: called with each sample id before it is read. Raises UserError if a shard cannot
        be read, or if neither a sample of the lot nor a spare one is usable."""
        ids = lot.samples.tolist()
        found: list[Any] = []
        bad: list[BadSample] = []
        for sample_id in ids:
            reading(sample_id)
            found.append(self._example(lot.epoch, sample_id, bad))
        examples, used = list(found), list(ids)
        if bad:
            usable = {i: e for i, e in zip(ids, found, strict=True) if e is not None}
            usable = usable or self._spare(lot, bad)
            for i, sample_id in enumerate(ids):
                if found[i] is None:
                    used[i] = _replacement(ids, i, usable)
                    length = self.reader.length(sample_id)
                    examples[i] = self.modality.fit(usable[used[i]], length)
        # Masks are drawn for the planned samples, even if they were replaced, so that their number
        # is as planned.
        rngs = [generator(self.seed, MASK, lot.epoch, sample_id) for sample_id in ids]
        batch = self.modality.collate(examples, rngs, lot.index)
        keys = tuple(self.reader.key(sample_id) for sample_id in used)
        assert lot.masked in (None, batch.terms), (
            f"planned {lot.masked} masked tokens, drew {batch.terms} for the samples {keys}"
        )
        return Made(dataclasses.replace(batch, keys=keys), tuple(bad))

    def _example(self, epoch: int, sample_id: int, bad: list[BadSample]) -> Any:
        """The decoded sample; None, and an entry in `bad`, if it cannot be used."""
        rng = generator(self.seed, CROP, epoch, sample_id)
        try:
            example = self.modality.decoded(self.reader.read(sample_id), rng)
            # `fit` returns the same object if the size is as planned.
            if self.modality.fit(example, self.reader.length(sample_id)) is not example:
                raise Unusable("length", "its length differs from that in the index")
        except UserError:
            raise  # of the shard
        except ValueError as error:
            bad.append(self.reader.bad(sample_id, error))
            return None
        except MemoryError:
            raise UserError(
                f"{self.reader.name(sample_id)}: there is not enough memory to decode it; lower "
                "data.workers, or leave the sample out"
            ) from None
        return example

    def _spare(self, lot: Lot, bad: list[BadSample]) -> dict[int, Any]:
        ignored: list[BadSample] = []  # they are counted in the lots that they belong to
        for sample_id in lot.spare.tolist():
            example = self._example(lot.epoch, sample_id, ignored)
            if example is not None:
                return {sample_id: example}
        raise UserError(
            f"none of {len(lot.samples)} samples of a micro-batch and {len(ignored)} like them can "
            f"be used; the first: {bad[0]}. {REMEDY}"
        )


def _replacement(ids: Sequence[int], i: int, usable: Mapping[int, Any]) -> int:
    """The usable sample that replaces ids[i]."""
    for sample_id in (*ids[:i][::-1], *ids[i:], *usable):
        if sample_id in usable:
            return sample_id
    raise AssertionError("no sample is usable")
