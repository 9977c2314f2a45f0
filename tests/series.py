"""A tiny modality for tests of the loader, numeric series, and shard sets of it in real tars.

A token is `STRIDE` numbers; samples are at most `crop` numbers long and at least `least`.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import zlib
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch

from d2v_ds.batch import Batch, mask_indices
from d2v_ds.data import shard_format
from d2v_ds.data.checksum import xxh3
from d2v_ds.data.shard_format import ShardEntry, ShardSet, open_set
from d2v_ds.masking import block_count, block_mask_1d

STRIDE = 4
Series = npt.NDArray[np.float32]


class SeriesModality:
    name: ClassVar[str] = "series"
    unit: ClassVar[str] = "numbers"
    keys: ClassVar[tuple[str, ...]] = ("series", "array")
    views = 2

    def __init__(self, crop: int = 200, least: int = 8) -> None:
        self.most, self.least = crop, least

    def crop(self, length: int) -> int:
        return 0 if length < self.least else min(length, self.most)

    def cost(self, length: int) -> float:
        return float(self.crop(length))

    def masked_tokens(self, length: int) -> int:
        return self.views * block_count(self.crop(length) // STRIDE, prob=0.5, inverse=False)

    def decode(self, sample: Mapping[str, bytes], rng: np.random.Generator) -> Series:
        series = np.frombuffer(next(sample[key] for key in self.keys if key in sample), "<i2")
        if (series < 0).any():
            raise ValueError("has negative numbers")
        start = int(rng.integers(len(series) - self.crop(len(series)) + 1))
        cropped: Series = series[start : start + self.crop(len(series))].astype(np.float32)
        return cropped

    def fit(self, example: Series, length: int) -> Series:
        size = self.crop(length)
        return example if len(example) == size else np.resize(example, size)

    def collate(
        self, examples: Sequence[Series], rngs: Sequence[np.random.Generator], index: int
    ) -> Batch:
        masks = [
            block_mask_1d(
                len(example) // STRIDE,
                prob=0.5,
                length=3,
                adjust=0.05,
                inverse=False,
                views=self.views,
                rng=rng,
            )
            for example, rng in zip(examples, rngs, strict=True)
        ]
        inputs = torch.zeros(len(examples), max(map(len, examples)))
        for row, example in zip(inputs, examples, strict=True):
            row[: len(example)] = torch.from_numpy(example)
        fields: dict[str, Any] = mask_indices(masks)
        return Batch(modality=self.name, index=index, inputs=inputs, views=self.views, **fields)


def series(key: str, length: int) -> bytes:
    """The content of a sample: follows from its key."""
    start = zlib.crc32(key.encode()) % 10_000
    return ((np.arange(length) + start) % 30_000).astype("<i2").tobytes()


def write_set(
    root: Path, lengths: Sequence[Sequence[int]], broken: Mapping[str, bytes] | None = None
) -> ShardSet:
    """A shard set with one shard for each sequence of lengths. Keys are s0-0, s0-1, s1-0, ...;
    broken: content of some samples."""
    root.mkdir(parents=True)
    entries = []
    for number, shard in enumerate(lengths):
        name = f"series-{number:06d}"
        keys = [f"s{number}-{i}" for i in range(len(shard))]
        contents = [
            (broken or {}).get(key, series(key, length))
            for key, length in zip(keys, shard, strict=True)
        ]
        tar, offsets, sizes, checksums = write_tar(keys, contents)
        (root / f"{name}.tar").write_bytes(tar)
        (root / f"{name}.idx").write_bytes(
            shard_format.index_bytes(
                ("json", "series"), len(tar), keys, offsets, sizes, checksums, array("I", shard)
            )
        )
        digest = hashlib.sha256(tar).hexdigest()
        entries.append(ShardEntry(name, len(shard), len(tar), sum(shard), digest))
    shards = ShardSet(root, "series", "numbers", 0, ("json", "series"), tuple(entries))
    (root / shard_format.INDEX_FILE).write_text(shard_format.set_json(shards))
    return open_set(root, "series")


def write_tar(
    keys: Sequence[str], contents: Sequence[bytes]
) -> tuple[bytes, array[int], array[int], array[int]]:
    """A tar of KEY.json and KEY.series members, with their offsets, sizes and checksums."""
    buffer, offsets, sizes, checksums = io.BytesIO(), array("q"), array("I"), array("I")
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for key, content in zip(keys, contents, strict=True):
            members = {"json": json.dumps({"key": key}).encode(), "series": content}
            for extension, member in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(member)
                offsets.append(buffer.tell() + tarfile.BLOCKSIZE)
                sizes.append(len(member))
                tar.addfile(info, io.BytesIO(member))
                checksums.append(xxh3(member))
    return buffer.getvalue(), offsets, sizes, checksums
