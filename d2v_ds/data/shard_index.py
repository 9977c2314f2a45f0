"""The index of one shard, NAME.idx: where each payload of the tar is, and how long each sample is.

    index_bytes -> NAME.idx --read_index--> ShardIndex
    NAME.idx --read_lengths--> lengths

An .idx begins with one line of JSON, which has the crc32 of the rest and, as its last entry, the
crc32 of the line up to there (`head`; indexes of earlier versions lack it). The line is padded with
spaces so that the arrays after it are aligned to 8 bytes. The arrays follow, little-endian and in
row-major order, for n samples with f fields (extensions):

    offset   i64[n, f]   of each payload in the tar; 0: the sample has no such member
    size     u32[n, f]   of each payload, in bytes
    checksum u32[n, f]   of each payload (checksum.py); the line of JSON names the kind
    length   u32[n]
    key      u32[n + 1]  bounds of the keys in the UTF-8 blob that follows

A payload is a member or a part of one: in text sets, a tar member KEY.npy holds many blocks, and
each is a sample. With two fields, a sample takes 40 bytes and its key, so the index of 20 million
samples takes about 1.5 GB on disk. The loader keeps only the lengths of all shards in memory.

Importing this module needs only the standard library; checking the arrays needs numpy.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import zlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from d2v_ds.data.checksum import BEST, checksum_of
from d2v_ds.data.set_file import unique_fields, whole
from d2v_ds.data.shard_format import ADVICE, ShardEntry, ShardSet
from d2v_ds.errors import UserError

INDEX_FORMAT = 2
ALIGNMENT = 8
HEAD_MOST = 1 << 16  # maximum bytes of the line of JSON
HEAD_ENTRIES = {"format", "fields", "samples", "bytes", "checksum", "crc32"}
HEAD_KEY = b', "head": '  # before the checksum of the line
BOUND = 4  # bytes of the bound of a key
KEY_MOST = 1 << 16  # bytes of a key, for the size of an index that is downloaded


@dataclass(frozen=True)
class ShardIndex:
    """The index of one shard. The arrays are read-only, row-major views: np.frombuffer wraps them
    without a copy, for example np.frombuffer(index.offsets, np.int64).reshape(index.count, -1)."""

    count: int
    bytes: int  # of the tar
    fields: tuple[str, ...]
    offsets: memoryview[int]  # int64 [count * fields]
    sizes: memoryview[int]  # uint32 [count * fields]
    checksum: str  # the kind of the checksums
    checksums: memoryview[int]  # uint32 [count * fields]
    lengths: memoryview[int]  # uint32 [count]
    key_bounds: memoryview[int]  # uint32 [count + 1]
    key_blob: memoryview[int]  # bytes

    def key(self, i: int) -> str:
        return str(self.key_blob[self.key_bounds[i] : self.key_bounds[i + 1]], "utf-8")


def read_index(
    path: str | Path,
    entry: ShardEntry | None = None,
    fields: Sequence[str] | None = None,
    advice: str = ADVICE,
) -> ShardIndex:
    """Reads a complete .idx and checks all of it. Raises UserError with its name if it is missing
    or damaged. The others as for `parse_index`."""
    path = Path(path)
    with _index_file(path, advice) as file:
        raw = file.read()
    return parse_index(raw, path, entry, fields, advice)


def index_of(shards: ShardSet, entry: ShardEntry, advice: str = ADVICE) -> ShardIndex:
    """The index of one shard of a set, which must fit the set. Raises UserError."""
    return read_index(shards.index(entry), entry, shards.fields, advice)


def parse_index(
    raw: bytes,
    name: object,
    entry: ShardEntry | None = None,
    fields: Sequence[str] | None = None,
    advice: str = ADVICE,
) -> ShardIndex:
    """The content of an .idx. name, advice: of the file in messages. entry, fields: of the set, if
    it is compared with them. Raises UserError."""
    data = memoryview(raw)
    try:
        head = _Head.parse(raw[: raw.index(b"\n") + 1])
        if entry:
            head.compare(entry, fields)
        if len(raw) < head.end:
            raise ValueError("it ends early")
        views = [data[first : first + size].cast(code) for code, first, size in head.arrays()]
        offsets, sizes, checksums, lengths, bounds = views
        end = head.end + bounds[head.samples]
        if end != len(data):
            raise ValueError(f"{len(data)} bytes, expected {end}")
        if zlib.crc32(data[head.size :]) != head.crc32:
            raise ValueError("its checksum is wrong")
        found = ShardIndex(
            head.samples,
            head.tar_bytes,
            head.fields,
            offsets,
            sizes,
            head.checksum,
            checksums,
            lengths,
            bounds,
            data[head.end :],
        )
        _check_cells(found, entry)
    except ValueError as error:
        raise _damaged(name, error, advice) from None
    try:
        checksum_of(found.checksum)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    return found


def _check_cells(index: ShardIndex, entry: ShardEntry | None) -> None:
    """Raises ValueError unless every payload is in the tar and every key is text. An index may have
    millions of cells, which takes numpy."""
    import numpy as np

    if index.count:
        offsets = np.frombuffer(index.offsets, np.int64)
        ends = offsets.astype(np.uint64) + np.frombuffer(index.sizes, np.uint32)
        if offsets.min() < 0 or int(ends.max()) > index.bytes:
            raise ValueError("a payload is not within the tar")
    bounds = np.frombuffer(index.key_bounds, np.uint32)
    if bounds[0] or (bounds[1:] < bounds[:-1]).any():
        raise ValueError("the bounds of its keys are not in order")
    str(index.key_blob, "utf-8")
    inner = np.frombuffer(index.key_blob, np.uint8)[bounds[bounds < len(index.key_blob)]]
    if ((inner & 0xC0) == 0x80).any():
        raise ValueError("a key ends within a character")
    if entry:
        _check_total(index.lengths, entry)


def _check_total(lengths: array[int] | memoryview[int], entry: ShardEntry) -> None:
    import numpy as np

    total = int(np.frombuffer(lengths, np.uint32).sum(dtype=np.uint64))
    if total != entry.length:
        raise ValueError(f"its lengths add up to {total}, not {entry.length}")


def most_bytes(entry: ShardEntry, fields: Sequence[str]) -> int:
    """The maximum size of the .idx of a shard."""
    return HEAD_MOST + entry.samples * (16 * len(fields) + 8 + KEY_MOST) + BOUND


def read_lengths(
    path: Path, entry: ShardEntry, fields: Sequence[str], advice: str = ADVICE
) -> array[int]:
    """Reads only the lengths of an .idx; checks its first line and its size. Raises UserError,
    which names the file, if it is missing, damaged, or belongs to another tar than `entry`."""
    with _index_file(path, advice) as file:
        try:
            head = _Head.parse(file.readline(HEAD_MOST))
            head.compare(entry, fields)
            size = os.fstat(file.fileno()).st_size
            if size < head.end:
                raise ValueError("it ends early")
            _, first, taken = head.arrays()[3]
            file.seek(first)
            lengths = array("I", file.read(taken))
            file.seek(head.end - BOUND)
            end = head.end + array("I", file.read(BOUND))[0]
            if size != end:
                raise ValueError(f"{size} bytes, expected {end}")
            _check_total(lengths, entry)
        except ValueError as error:
            raise _damaged(path, error, advice) from None
    return lengths


@dataclass(frozen=True)
class _Head:
    """The line of JSON of an .idx."""

    size: int  # of the line itself
    samples: int
    tar_bytes: int
    fields: tuple[str, ...]
    checksum: str
    crc32: int  # of the rest of the file

    @staticmethod
    def parse(line: bytes) -> _Head:
        """Raises ValueError."""
        before, own, _ = line.rpartition(HEAD_KEY)
        if own and line != _with_checksum(before):
            raise ValueError("the checksum of its first line is wrong")
        try:
            raw = json.loads(line)
        except RecursionError as error:
            raise ValueError(str(error)) from None
        if not isinstance(raw, dict) or not line.endswith(b"\n"):
            raise ValueError("its first line is not a JSON object")
        if raw.get("format") != INDEX_FORMAT:
            found = ascii(raw.get("format"))[:40]
            raise ValueError(f"has format {found}, but this version reads {INDEX_FORMAT}")
        if not own and raw.keys() != HEAD_ENTRIES:  # of an earlier version, without a checksum
            raise ValueError("its first line has other entries than it must have")
        if not isinstance(raw.get("checksum"), str):
            raise ValueError("its kind of checksum is not a text")
        return _Head(
            len(line),
            whole(raw.get("samples"), "its number of samples", 2**32 - 2),
            whole(raw.get("bytes"), "the size of its tar"),
            unique_fields(raw.get("fields")),
            raw["checksum"],
            whole(raw.get("crc32"), "its crc32", 2**32 - 1),
        )

    def compare(self, entry: ShardEntry, fields: Sequence[str] | None) -> None:
        """Raises ValueError unless it is of this shard of a set with these fields."""
        found, expected = (self.samples, self.tar_bytes), (entry.samples, entry.bytes)
        if found != expected:
            raise ValueError(
                f"it does not belong to its tar: {found[0]} samples and {found[1]} bytes, "
                f"expected {expected[0]} and {expected[1]}"
            )
        if fields is not None and self.fields != tuple(fields):
            raise ValueError(
                f"its fields are {', '.join(self.fields)}, but those of the set are "
                f"{', '.join(fields)}"
            )

    def arrays(self) -> list[tuple[Literal["q", "I"], int, int]]:
        """(type, first byte, bytes) of each array, in order."""
        cells = self.samples * len(self.fields)
        numbers: list[tuple[Literal["q", "I"], int]] = [
            ("q", cells),
            ("I", cells),
            ("I", cells),
            ("I", self.samples),
            ("I", self.samples + 1),
        ]
        places, first = [], self.size
        for code, number in numbers:
            size = number * array(code).itemsize
            places.append((code, first, size))
            first += size
        return places

    @property
    def end(self) -> int:
        """The first byte of the blob of keys."""
        _, first, size = self.arrays()[-1]
        return first + size


def _index_file(path: Path, advice: str) -> BinaryIO:
    try:
        return path.open("rb")
    except FileNotFoundError:
        raise UserError(f"{path}: is missing; {advice}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def _damaged(name: object, reason: object, advice: str) -> UserError:
    return UserError(f"{name}: is damaged ({reason}); {advice}")


def index_bytes(
    fields: Sequence[str],
    tar_bytes: int,
    keys: Sequence[str],
    offsets: array[int],
    sizes: array[int],
    checksums: array[int],
    lengths: array[int],
    checksum: str = BEST,
) -> bytes:
    """The content of an .idx; arrays as in ShardIndex ("q" for offsets, "I" for the others)."""
    assert sys.byteorder == "little", "shards are written on little-endian machines only"
    count = len(keys)
    assert len(offsets) == len(sizes) == len(checksums) == count * len(fields)
    assert len(lengths) == count
    blob = [key.encode() for key in keys]
    bounds = array("I", [0])
    for key in blob:
        bounds.append(bounds[-1] + len(key))
    body = b"".join([offsets, sizes, checksums, lengths, bounds, *blob])
    line = json.dumps(
        {
            "format": INDEX_FORMAT,
            "fields": list(fields),
            "samples": count,
            "bytes": tar_bytes,
            "checksum": checksum,
            "crc32": zlib.crc32(body),
        }
    ).encode()
    assert len(line) < HEAD_MOST - 32, f"{len(fields)} fields"  # room for its checksum
    return _with_checksum(line.removesuffix(b"}")) + body


def _with_checksum(line: bytes) -> bytes:
    """The first line of an .idx. line: without its checksum and without the brace after it."""
    return _padded(line + HEAD_KEY + b"%d" % zlib.crc32(line))


def _padded(line: bytes) -> bytes:
    return line + b"}" + b" " * (-(len(line) + 2) % ALIGNMENT) + b"\n"


def index_digest(index: bytes) -> str:
    """SHA-256 of an .idx, in the form without the checksum of its first line. Runs compare it with
    that in their checkpoints, which may be of an index that an earlier version made."""
    line, _, body = index.partition(b"\n")
    return hashlib.sha256(_padded(line.rpartition(HEAD_KEY)[0]) + body).hexdigest()
