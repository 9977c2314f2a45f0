"""The contract between shards/ and the loader: a shard set on disk. Importing it needs only the
standard library; checking an .idx needs numpy.

A shard set is one folder and one split; train and test are two sets:

    SET/
      speech-000000.tar    plain WebDataset tar; members KEY.flac, KEY.json
      speech-000000.idx    binary index of that tar: offsets, sizes, checksums, lengths
      index.json           the set: modality, unit, sample rate; sizes and hashes of its shards
      quarantine.jsonl     inputs that were left out, with the reason

index.json is written last and atomically; a folder without it is not a complete set. set_file.py
checks its content. Lengths are in the modality's unit (speech: audio frames at the set's sample
rate).

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
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import zlib
from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, BinaryIO, Literal

from d2v_ds.data.checksum import BEST, checksum_of
from d2v_ds.data.set_file import FORMAT, OtherFormat, parse_set, unique_fields, whole
from d2v_ds.errors import UserError

INDEX_FORMAT = 2  # of an .idx
INDEX_FILE = "index.json"
ADVICE = "copy it again or convert the corpus again"  # about a damaged file of a local set


@dataclass(frozen=True)
class ShardEntry:
    """One shard of a set, as index.json lists it."""

    name: str  # of its files, without .tar and .idx
    samples: int
    bytes: int  # of the tar
    length: int  # sum over its samples
    sha256: str  # of the tar; of the .idx if the set is `indexed`


@dataclass(frozen=True)
class ShardSet:
    root: Path
    modality: str
    length_unit: str  # frames, pixels or tokens
    sample_rate: int  # frames per second; 0 if the modality has none
    fields: tuple[str, ...]  # members of every sample, without the dot
    shards: tuple[ShardEntry, ...]
    tars: Path | None = None  # the folder of the tars, if it is not root
    about: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)  # index.json
    remote: str = ""  # the URL prefix or command, if remote (cache/remote.py)
    urls: dict[str, str] = field(default_factory=dict)  # of streamed tars, by name, for messages
    source: ShardSet | None = None  # of a copy on this node's disk (cache/stage.py)

    @property
    def indexed(self) -> bool:
        """Whether the tars are from a third party and only their headers were read."""
        return bool(self.about.get("indexed"))

    @property
    def samples(self) -> int:
        return sum(shard.samples for shard in self.shards)

    @property
    def length(self) -> int:
        return sum(shard.length for shard in self.shards)

    def tar(self, shard: ShardEntry) -> Path:
        return (self.tars or self.root) / f"{shard.name}.tar"

    def index(self, shard: ShardEntry) -> Path:
        return self.root / f"{shard.name}.idx"


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


def open_set(path: str | Path, modality: str = "", check_tars: bool = True) -> ShardSet:
    """The shard set in a folder. modality: the required modality; "": any.

    Reads and checks index.json and compares the sizes of the tars, but does not read them. Raises
    UserError if the folder is not a complete set of this modality, or (check_tars) if a tar is
    missing or has another size.
    """
    root = Path(path)
    result = set_of(_read_set_file(root), root, root / INDEX_FILE)
    if modality and result.modality != modality:
        raise UserError(f"{root}: holds {result.modality}, but {modality} is required")
    if not result.samples:
        raise UserError(f"{root}: the shard set has no samples; convert a corpus that has some")
    for shard in result.shards if check_tars else ():
        _check_tar(result.tar(shard), shard.bytes)
    return result


def set_of(content: bytes, root: Path, name: object, advice: str = ADVICE) -> ShardSet:
    """The set in `root` whose index.json has this content. name, advice: of index.json in messages.
    Raises UserError."""
    try:
        raw = parse_set(content)
    except OtherFormat as error:
        raise UserError(
            f"{name}: {error}; convert the corpus again with this version's d2v-shards"
        ) from None
    except ValueError as error:
        raise UserError(f"{name}: is damaged ({error}); {advice}") from None
    return ShardSet(
        root,
        raw["modality"],
        raw["unit"],
        raw["sample_rate"],
        tuple(raw["fields"]),
        tuple(
            ShardEntry(**{f.name: entry[f.name] for f in fields(ShardEntry)})
            for entry in raw["shards"]
        ),
        root / raw["tars"] if "tars" in raw else None,
        raw,
    )


def _read_set_file(root: Path) -> bytes:
    try:
        return (root / INDEX_FILE).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(_why_no_set(root)) from None
    except OSError as error:
        raise UserError(f"{root / INDEX_FILE}: cannot be read ({error.strerror})") from None


def _why_no_set(root: Path) -> str:
    make = "`d2v-shards --help` explains how to make one"
    if not root.exists():
        return f"{root}: no such shard set; {make}"
    if not root.is_dir():
        return f"{root}: is a file, but a shard set is a folder with an {INDEX_FILE}; {make}"
    names = os.listdir(root)
    if PLAN_FILE in names:
        return f"{root}: its conversion is not complete; run the same d2v-shards command again"
    if any(name.endswith(".tar") for name in names):
        return (
            f"{root}: has tars but no {INDEX_FILE}, so d2v-shards did not write them; "
            f"make an index with `d2v-shards index {root}`, or convert their corpus"
        )
    below = sorted(name for name in names if (root / name / INDEX_FILE).is_file())
    if below:
        return f"{root}: is not a shard set, but contains some: {', '.join(below)}"
    return f"{root}: is not a shard set, because it has no {INDEX_FILE}; {make}"


def _check_tar(path: Path, size: int) -> None:
    try:
        found = path.stat().st_size
    except FileNotFoundError:
        raise UserError(
            f"{path}: is missing, but {INDEX_FILE} lists it; copy it again or convert again"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if found != size:
        raise UserError(
            f"{path}: has {found} bytes, but {INDEX_FILE} lists {size}; copy it again or "
            "convert again"
        )


def require_copy(
    shards: ShardSet, entry: ShardEntry, tar: object, advice: str, size: int, digest: str
) -> None:
    """Raises UserError unless a copied tar has the size and the SHA-256 of its entry. The SHA-256
    of third-party tars is unknown, so only their size is checked."""
    if size != entry.bytes:
        raise UserError(f"{tar}: has {size} bytes, but {INDEX_FILE} has {entry.bytes}; {advice}")
    if not shards.indexed and digest != entry.sha256:
        raise UserError(f"{tar}: its SHA-256 differs from {INDEX_FILE}; {advice}")


def fingerprint(shards: ShardSet) -> str:
    """A hash of the set's content: the SHA-256 over the hashes of its shards, in order."""
    return hashlib.sha256("\n".join(s.sha256 for s in shards.shards).encode()).hexdigest()


# ------------------------------------------------------------------------------- one shard's index

PLAN_FILE = "plan.json"  # of a conversion that is not complete
ALIGNMENT = 8
HEAD_MOST = 1 << 16  # maximum bytes of the line of JSON
HEAD_ENTRIES = {"format", "fields", "samples", "bytes", "checksum", "crc32"}
HEAD_KEY = b', "head": '  # before the checksum of the line
BOUND = 4  # bytes of the bound of a key


def read_index(path: str | Path, entry: ShardEntry | None = None, **more: Any) -> ShardIndex:
    """Reads a complete .idx and checks all of it. Raises UserError with its name if it is missing
    or damaged. entry, more: as for `parse_index`, with which it is compared."""
    path = Path(path)
    with _index_file(path) as file:
        raw = file.read()
    return parse_index(raw, path, entry, **more)


def index_of(shards: ShardSet, entry: ShardEntry) -> ShardIndex:
    """The index of one shard of a set, which must fit the set. Raises UserError."""
    return read_index(shards.index(entry), entry, fields=shards.fields)


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

    offsets, sizes = np.frombuffer(index.offsets, np.int64), np.frombuffer(index.sizes, np.uint32)
    if index.count and (offsets.min() < 0 or (offsets.astype(np.uint64) + sizes).max() > index.bytes):
        raise ValueError("a payload is not within the tar")
    bounds = np.frombuffer(index.key_bounds, np.uint32)
    if bounds[0] or (bounds[1:] < bounds[:-1]).any():
        raise ValueError("the bounds of its keys are not in order")
    str(index.key_blob, "utf-8")
    inner = np.frombuffer(index.key_blob, np.uint8)[bounds[bounds < len(index.key_blob)]]
    if ((inner & 0xC0) == 0x80).any():
        raise ValueError("a key ends within a character")
    total = int(np.frombuffer(index.lengths, np.uint32).sum(dtype=np.uint64))
    if entry and total != entry.length:
        raise ValueError(f"its lengths add up to {total}, not {entry.length}")


def read_lengths(
    path: Path, entry: ShardEntry, fields: Sequence[str], advice: str = ADVICE
) -> array[int]:
    """Reads only the lengths of an .idx; checks its first line and its size. Raises UserError,
    which names the file, if it is missing, damaged, or belongs to another tar than `entry`."""
    with _index_file(path) as file:
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
        except ValueError as error:
            raise _damaged(path, error, advice) from None
    if sum(lengths) != entry.length:
        error = f"its lengths add up to {sum(lengths)}, not {entry.length}"
        raise _damaged(path, error, advice)
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
        before, own, after = line.rpartition(HEAD_KEY)
        if own and line != _with_checksum(before):
            raise ValueError(f"the checksum of its first line is wrong: {ascii(after)[:40]}")
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


def _index_file(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except FileNotFoundError:
        raise UserError(f"{path}: is missing; {ADVICE}") from None
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


def set_json(shards: ShardSet, **about: Any) -> str:
    """The content of index.json. about: information for people (options, converter, ...)."""
    return json.dumps(
        {
            "format": FORMAT,
            "modality": shards.modality,
            "unit": shards.length_unit,
            "sample_rate": shards.sample_rate,
            "fields": list(shards.fields),
            "samples": shards.samples,
            "bytes": sum(s.bytes for s in shards.shards),
            "length": shards.length,
            **({"tars": str(shards.tars)} if shards.tars else {}),
            **about,
            "shards": [asdict(s) for s in shards.shards],
        },
        indent=1,
    )
