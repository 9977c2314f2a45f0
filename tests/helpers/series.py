"""Shard sets of sensor readings (sensor.py) in real tars, for tests of the loader."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import zlib
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from d2v_ds.data import shard_format, shard_index
from d2v_ds.data.checksum import xxh3
from d2v_ds.data.shard_format import ShardEntry, ShardSet, open_set
from tests.helpers.sensor import Sensor, SensorConfig


def modality(crop: int = 200, least: int = 8) -> Sensor:
    return Sensor(SensorConfig(crop=crop, least=least))


def series(key: str, length: int) -> bytes:
    """The content of a sample, which is a function of its key and length."""
    start = zlib.crc32(key.encode()) % 10_000
    return ((np.arange(length) + start) % 30_000).astype("<i2").tobytes()


def write_set(
    root: Path, lengths: Sequence[Sequence[int]], broken: Mapping[str, bytes] | None = None
) -> ShardSet:
    """A shard set with one shard for each sequence of lengths; keys are s0-0, s0-1, s1-0 ...

    broken: other content for some samples.
    """
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
            shard_index.index_bytes(
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
