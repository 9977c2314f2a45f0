"""Reading: (position in the set) -> members, and (the samples of a micro-batch) -> Batch.

Runs in the loader's worker processes, or in the training process where there are none. A member is
read by one os.pread at the place that the index names: no tar is ever walked through.
"""

from __future__ import annotations

import dataclasses
import os
import pickle
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from d2v_ds.batch import Batch
from d2v_ds.errors import UserError
from d2v_ds.loader.plan import CROP, MASK, Positions
from d2v_ds.masking import generator
from d2v_ds.modalities.base import Modality
from d2v_ds.shard_format import ShardIndex, ShardSet, read_index

OPEN_SHARDS = 64  # that a reader holds, each with its index


class Reader:
    """Samples of a set by position. fields: the members to read."""

    def __init__(self, shards: ShardSet, fields: Sequence[str]) -> None:
        self.shards, self.fields = shards, tuple(fields)
        self.bounds = np.cumsum([0, *(shard.samples for shard in shards.shards)])
        self.open: OrderedDict[int, tuple[int, ShardIndex]] = OrderedDict()  # least recent first

    def read(self, position: int, verify: bool) -> dict[str, bytes]:
        """A sample's `fields`. Raises ValueError saying what is wrong with it.

        verify: all members are read and their common checksum is compared with the index.
        """
        shard, row = self._locate(position)
        file, index = self._opened(shard)
        first = row * len(index.fields)
        members = {}
        for i, field in enumerate(index.fields):
            if verify or field in self.fields:
                size = index.sizes[first + i]
                members[field] = os.pread(file, size, index.offsets[first + i])
                if len(members[field]) < size:
                    raise ValueError(f"the tar ends within its .{field}")
        if verify:
            crc = 0
            for member in members.values():
                crc = zlib.crc32(member, crc)
            if crc != index.crcs[row]:
                raise ValueError("its checksum differs from the index, so its bytes have changed")
        return {field: members[field] for field in self.fields}

    def key(self, position: int) -> str:
        shard, row = self._locate(position)
        return self._opened(shard)[1].key(row)

    def error(self, position: int, reason: object) -> UserError:
        """What to tell of a sample that cannot be used."""
        tar = self.shards.tar(self.shards.shards[self._locate(position)[0]])
        return UserError(
            f"{tar}, sample {self.key(position)!r}: {reason}. Copy the shard again or convert "
            "again; `d2v-shards verify` lists all that is wrong with a set"
        )

    def close(self) -> None:
        while self.open:
            os.close(self.open.popitem()[1][0])

    def _locate(self, position: int) -> tuple[int, int]:
        """Shard and row in it."""
        shard = int(np.searchsorted(self.bounds, position, side="right")) - 1
        return shard, position - int(self.bounds[shard])

    def _opened(self, shard: int) -> tuple[int, ShardIndex]:
        if shard in self.open:
            self.open.move_to_end(shard)
            return self.open[shard]
        if len(self.open) == OPEN_SHARDS:
            os.close(self.open.popitem(last=False)[1][0])
        entry = self.shards.shards[shard]
        index, tar = read_index(self.shards.index(entry)), self.shards.tar(entry)
        try:
            self.open[shard] = (os.open(tar, os.O_RDONLY | os.O_CLOEXEC), index)
        except OSError as error:
            raise UserError(f"{tar}: cannot be read ({error.strerror})") from None
        return self.open[shard]


@dataclass(frozen=True)
class Lot:
    """What it takes to make one micro-batch, anywhere."""

    epoch: int
    index: int  # of the micro-batch in its step
    samples: Positions
    masked: int | None  # tokens, as planned; None: not planned
    verify: bool


class MicroBatches(Dataset[Any]):
    """Lot -> Batch, as torch's DataLoader wants it.

    by_pipe: batches are pickled whole, where there is too little shared memory to hand them over.
    """

    def __init__(self, reader: Reader, modality: Modality, seed: int, by_pipe: bool) -> None:
        self.reader, self.modality, self.seed, self.by_pipe = reader, modality, seed, by_pipe

    def __getitem__(self, lot: Lot) -> Batch | bytes | UserError:
        try:
            batch = self.make(lot)
        except UserError as error:  # returned, since torch would wrap a raised one in a traceback
            return error
        return pickle.dumps(batch) if self.by_pipe else batch

    def make(self, lot: Lot) -> Batch:
        """Crops and masks are drawn from (seed, epoch, sample). Raises UserError."""
        positions = lot.samples.tolist()
        examples = [self._example(lot, position) for position in positions]
        rngs = [generator(self.seed, MASK, lot.epoch, position) for position in positions]
        batch = self.modality.collate(examples, rngs, lot.index)
        keys = tuple(self.reader.key(position) for position in positions)
        assert lot.masked in (None, len(batch.masked)), (
            f"planned {lot.masked} masked tokens, drew {len(batch.masked)} for the samples {keys}"
        )
        return dataclasses.replace(batch, keys=keys)

    def _example(self, lot: Lot, position: int) -> Any:
        rng = generator(self.seed, CROP, lot.epoch, position)
        try:
            return self.modality.decode(self.reader.read(position, lot.verify), rng)
        except UserError:
            raise
        except ValueError as error:
            raise self.reader.error(position, error) from None
