"""NAME.idx: damage anywhere in it is found, and those of earlier versions are still read."""

from __future__ import annotations

import hashlib
import json
import re
from array import array
from pathlib import Path

import pytest

from d2v_ds.data.shard_format import ShardEntry
from d2v_ds.data.shard_index import index_bytes, index_digest, parse_index, read_index, read_lengths
from d2v_ds.errors import UserError

FIELDS = ("flac", "json")
ENTRY = ShardEntry("x", 3, 10_240, 6, "0" * 64)


def make(
    offsets: tuple[int, ...] = (512, 1024, 2048, 3072, 4096, 5120),
    sizes: tuple[int, ...] = (1, 2, 3, 4, 5, 6),
    lengths: tuple[int, ...] = (1, 2, 3),
    fields: tuple[str, ...] = FIELDS,
) -> bytes:
    keys = ["a/b", "ключ", "c"]
    numbers = [array("q", offsets), array("I", sizes), array("I", sizes), array("I", lengths)]
    return index_bytes(fields, 10_240, keys, *numbers)


def old(data: bytes) -> bytes:
    """As earlier versions wrote it: without a checksum of the first line."""
    line, _, body = data.partition(b"\n")
    head = re.sub(rb', "head": \d+} *$', b"}", line)
    return head + b" " * (-(len(head) + 1) % 8) + b"\n" + body


def refused(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    with pytest.raises(UserError) as whole:
        read_index(path, ENTRY, FIELDS)
    with pytest.raises(UserError):
        read_lengths(path, ENTRY, FIELDS)
    assert str(path) in str(whole.value)
    return str(whole.value)


def test_every_bit_of_the_first_line_is_covered(tmp_path: Path) -> None:
    data = make()
    for at in range(data.index(b"\n") + 1):
        for bit in range(8):
            broken = bytearray(data)
            broken[at] ^= 1 << bit
            with pytest.raises(UserError, match=r"x\.idx: is damaged"):
                parse_index(bytes(broken), "x.idx")
        refused(tmp_path / "x.idx", bytes(broken))


def test_every_byte_of_the_rest_is_covered(tmp_path: Path) -> None:
    data, path = make(), tmp_path / "x.idx"
    for at in range(data.index(b"\n") + 1, len(data)):
        broken = bytearray(data)
        broken[at] ^= 1 << at % 8
        path.write_bytes(broken)
        with pytest.raises(UserError, match=r"x\.idx: is damaged"):
            read_index(path)


def test_an_index_of_an_earlier_version(tmp_path: Path) -> None:
    path, before = tmp_path / "x.idx", old(make())
    assert set(json.loads(before.partition(b"\n")[0])) == {
        "format", "fields", "samples", "bytes", "checksum", "crc32",
    }  # fmt: skip
    path.write_bytes(before)
    found = read_index(path, ENTRY, FIELDS)
    assert [found.key(i) for i in range(3)] == ["a/b", "ключ", "c"]
    assert read_lengths(path, ENTRY, FIELDS).tolist() == [1, 2, 3]
    for wrong, fault in (
        (before.replace(b'"flac"', b'"flas"'), "its fields are flas, json"),
        (before.replace(b'"bytes": 10240', b'"bytes": 10241'), "does not belong to its tar"),
        (before.replace(b'"samples": 3', b'"samples": 2'), "does not belong to its tar"),
        (before.replace(b'"crc32": ', b'"crb32": '), "other entries than it must have"),
        (before.replace(b'"samples": 3', b'"samples":-3'), "is -3, not an integer"),
    ):
        assert fault in refused(path, wrong)


def test_the_hash_of_an_index_does_not_depend_on_the_version() -> None:
    """Checkpoints have it, of indexes that earlier versions made."""
    assert index_digest(make()) == hashlib.sha256(old(make())).hexdigest()


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (make(offsets=(512, 1024, 2048, 3072, 4096, 10_240)), "a payload is not within the tar"),
        (make(offsets=(512, 1024, 2048, 3072, 4096, 2**63 - 1)), "a payload is not within the tar"),
        (make(offsets=(-512, 1024, 2048, 3072, 4096, 5120)), "a payload is not within the tar"),
        (make(sizes=(2**32 - 1, 2, 3, 4, 5, 6)), "a payload is not within the tar"),
        (make(lengths=(1, 2, 4)), "its lengths add up to 7, not 6"),
        (make(fields=("json", "flac")), "its fields are json, flac, but those of the set are flac"),
    ],
)
def test_an_index_that_is_not_of_this_set(tmp_path: Path, data: bytes, fault: str) -> None:
    (tmp_path / "x.idx").write_bytes(data)
    with pytest.raises(UserError, match=rf"x\.idx: is damaged \({fault}"):
        read_index(tmp_path / "x.idx", ENTRY, FIELDS)


def test_cut_and_longer_files(tmp_path: Path) -> None:
    data = make()
    for size in range(0, len(data), 7):
        refused(tmp_path / "x.idx", data[:size])
    refused(tmp_path / "x.idx", data + b"x")
