"""Checksums by name: values that must never change, and errors for unknown kinds."""

from __future__ import annotations

import zlib
from array import array
from pathlib import Path

import pytest

from d2v_ds.data import checksum
from d2v_ds.data.checksum import checksum_of
from d2v_ds.data.shard_format import ShardSet
from d2v_ds.data.shard_index import index_bytes, read_index
from d2v_ds.errors import UserError
from d2v_ds.loader.reading import Reader
from tests.helpers.series import write_set


def test_values() -> None:
    """XXH3-64 of no bytes is 2d06800538d394c2 (its specification); 32 bits are kept."""
    xxh3, crc32 = checksum_of("xxh3"), checksum_of("crc32")
    assert xxh3 and crc32
    assert xxh3(b"") == 0x38D394C2 and crc32(b"123456789") == 0xCBF43926
    assert xxh3(memoryview(b"abc")[1:]) == xxh3(b"bc") < 1 << 32
    assert checksum_of("none") is None and checksum.BEST == "xxh3"


def test_unknown_and_unavailable_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="'md5': this version supports xxh3, crc32 and none"):
        checksum_of("md5")
    monkeypatch.setattr(checksum, "xxhash", None)
    with pytest.raises(UserError, match="'xxh3': needs the package xxhash; install it"):
        checksum_of("xxh3")


@pytest.mark.parametrize("kind", ["crc32", "none"])
def test_a_reader_uses_the_kind_in_the_index(tmp_path: Path, kind: str) -> None:
    shards = write_set(tmp_path / "set", [[50] * 5])
    [entry] = shards.shards
    index = read_index(shards.index(entry))
    data = shards.tar(entry).read_bytes()
    places = zip(index.offsets, index.sizes, strict=True)
    sums = [zlib.crc32(data[first : first + size]) for first, size in places]
    checksums = array("I", sums if kind == "crc32" else [0] * len(sums))
    keys, columns = [index.key(i) for i in range(5)], (index.offsets, index.sizes, index.lengths)
    offsets, sizes, lengths = (array(view.format, view) for view in columns)
    shards.index(entry).write_bytes(
        index_bytes(index.fields, index.bytes, keys, offsets, sizes, checksums, lengths, kind)
    )
    assert read(shards) == 5
    changed = bytearray(data)
    changed[index.offsets[3] + 1] ^= 1
    shards.tar(entry).write_bytes(changed)
    if kind == "none":
        assert read(shards) == 5
    else:
        with pytest.raises(ValueError, match=r"its .* has changed"):
            read(shards)


def read(shards: ShardSet) -> int:
    reader = Reader(shards, shards.fields)
    try:
        return sum(len(reader.read(sample_id)) == 2 for sample_id in range(shards.samples))
    finally:
        reader.close()
