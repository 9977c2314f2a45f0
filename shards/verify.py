"""Checks a shard set against its index, member by member: structure, checksums, real decoding.

    set -> one job a shard over processes -> problems, one line each

webdataset ends a shard in silence at the first damaged header; here the whole tar is walked, past
damage too, and held against the index, and each sample is decoded.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from d2v_ds.data.checksum import checksum_of
from d2v_ds.data.headers import SIDE_FIELDS
from d2v_ds.data.shard_format import (
    INDEX_FILE,
    ShardEntry,
    ShardIndex,
    ShardSet,
    open_set,
    read_index,
)
from d2v_ds.data.tar_scan import BLOCK, DamagedTar, Member, members, next_header, samples
from d2v_ds.errors import UserError
from d2v_ds.modalities import REGISTRY, modality_class
from d2v_ds.modalities.base import Modality
from shards.workers import run_jobs

MAX_LINES = 20  # of problems, a shard
NOTE = "note: "  # begins a line about what need not be wrong


@dataclass
class Checked:
    """One shard."""

    name: str
    problems: list[str] = field(default_factory=list)
    keys: bytes = b""  # uint64 hash of each sample's key
    contents: bytes = b""  # and of its payload


def verify(path: Path, processes: int) -> Iterator[str]:
    """Problems of a set, a line each; and notes, for corpora do hold things twice. Raises UserError
    when there is no set at all."""
    shards = open_set(path, check_tars=False)
    about = json.loads((path / INDEX_FILE).read_bytes())
    if about["samples"] != shards.samples or about["length"] != shards.length:
        yield f"{INDEX_FILE}: its shards do not add up to its samples and length"
    checked: dict[str, Checked] = {}
    modality = modality_class(shards.modality) if shards.modality in REGISTRY else None
    if modality is None:
        yield (
            f"{NOTE}modality {shards.modality!r} is not installed here: samples are not decoded, "
            "structure and checksums are checked"
        )
    jobs = [(shards, shard, about, modality) for shard in shards.shards]
    for one in run_jobs(verify_shard, jobs, processes):
        yield from (f"{one.name}: {problem}" for problem in one.problems)
        checked[one.name] = one
    order = [checked[shard.name] for shard in shards.shards]
    yield from _repeated(shards, order, "keys", "its key")
    yield from (NOTE + line for line in _repeated(shards, order, "contents", "its content"))


def verify_shard(
    job: tuple[ShardSet, ShardEntry, Mapping[str, Any], type[Modality] | None],
) -> Checked:
    """modality: None if it is not installed here, so that samples cannot be decoded."""
    shards, shard, about, modality = job
    packed = modality.packed_keys if modality else {}
    result = Checked(shard.name)
    problems = result.problems
    try:
        index = read_index(shards.index(shard))
    except UserError as error:
        problems.append(str(error))
        return result
    keys = [index.key(i) for i in range(index.count)]
    told = (shard.samples, shard.bytes, shard.length, shards.fields)
    if (index.count, index.bytes, sum(index.lengths), index.fields) != told:
        problems.append("its index and index.json disagree on samples, bytes, length or fields")
    tar = shards.tar(shard)
    try:
        file = tar.open("rb")
    except OSError as error:
        problems.append(f"{tar.name}: {error.strerror}")
        return result
    indexed = bool(about.get("indexed"))  # not written by d2v-shards
    with file:
        problems += _check_file(file, shard, indexed)
        problems += _check_structure(file, index, keys, packed, indexed)
        contents = np.zeros(index.count, np.uint64)
        for i, key in enumerate(keys):
            problem, contents[i] = _check_sample(file, index, i, modality, about)
            if problem:
                problems.append(f"sample {key!r}: {problem}")
    result.keys = np.array([_hash(key.encode()) for key in keys], np.uint64).tobytes()
    result.contents = contents.tobytes()
    if len(problems) > MAX_LINES:
        problems[MAX_LINES:] = [f"and {len(problems) - MAX_LINES} more problems"]
    return result


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def _check_file(file: BinaryIO, shard: ShardEntry, indexed: bool) -> Iterator[str]:
    size = file.seek(0, 2)
    if size != shard.bytes:
        yield f"has {size} bytes, index.json says {shard.bytes}"
        return
    if indexed:  # no more is known
        return
    file.seek(0)
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    if digest.hexdigest() != shard.sha256:
        yield "its sha256 is not the one in index.json"


# ---------------------------------------------------------------------------------------- structure


def _check_structure(
    file: BinaryIO,
    index: ShardIndex,
    keys: Sequence[str],
    packed: Mapping[str, str],
    indexed: bool,
) -> Iterator[str]:
    """The members of the tar must be those of the index, those of a sample side by side; of tars
    that others made the index may leave some out."""
    found: list[Member] = []
    damage: list[DamagedTar] = []
    _walk(file, found, damage)
    starts = [member.offset for member in found]
    headers = {offset - BLOCK: i for i, offset in enumerate(index.offsets) if offset}
    for error in damage:
        cell = headers.get(error.position)
        yield str(error) if cell is None else f"at {_name(index, keys, packed, cell)[0]}: {error}"
    told = {error.position for error in damage}
    used = set()
    for i, offset in enumerate(index.offsets):
        if not offset or offset - BLOCK in told:  # the sample has no such member
            continue
        name, row = _name(index, keys, packed, i)
        at = bisect_right(starts, offset) - 1
        member = found[at] if at >= 0 else Member("nothing", 0, 0)
        inside = member.offset <= offset <= offset + index.sizes[i] <= member.offset + member.size
        whole = (member.offset, member.size) == (offset, index.sizes[i])
        same = member.name == name or _cut(member.name) == _cut(name)
        if not (inside and same and (row or whole)):
            yield (
                f"the index says that {name}, {index.sizes[i]} bytes, lies at byte {offset}; there "
                f"lies {member.name}, {member.size} bytes at byte {member.offset}"
            )
        used.add(at)
    if not indexed:
        for at in sorted(set(range(len(found))) - used):
            yield f"{found[at].name} at byte {found[at].offset - BLOCK} is not in the index"
    groups = Counter(key for key, _ in samples(found))
    for key in (key for key, number in groups.items() if number > 1):
        yield f"the members of {key!r} do not lie together, or are there twice"


def _walk(file: BinaryIO, found: list[Member], damage: list[DamagedTar]) -> None:
    """All members, those behind a damaged header too."""
    start: int | None = 0
    while start is not None:
        try:
            for member in members(file, start):
                found.append(member)
            return
        except DamagedTar as error:
            damage.append(error)
            start = next_header(file, error.position)


def _name(
    index: ShardIndex, keys: Sequence[str], packed: Mapping[str, str], i: int
) -> tuple[str, bool]:
    """(name of the member that cell i of the index lies in, whether it is a row of it)."""
    row, column = divmod(i, len(index.fields))
    key, extension = keys[row], index.fields[column]
    if extension in packed:
        return f"{key.rpartition('/')[0]}.{packed[extension]}", True
    return f"{key}.{extension}", False


def _cut(name: str) -> tuple[str, str]:
    """Key and field."""
    return next(
        ((key, next(iter(group))) for key, group in samples([Member(name, 0, 0)])), ("", "")
    )


# ------------------------------------------------------------------------------------------ samples


def _check_sample(
    file: BinaryIO,
    index: ShardIndex,
    i: int,
    modality: type[Modality] | None,
    about: Mapping[str, Any],
) -> tuple[str, int]:
    """(what is wrong with sample i, "" if nothing; a hash of its content)."""
    payloads, changed = read_members(file, index, i)
    content = _hash(b"".join(data for name, data in payloads.items() if name not in SIDE_FIELDS))
    if changed:
        return f"the checksum of its .{changed[0]} is not the one in the index", content
    if modality is None:
        return "", content
    try:
        length = modality.check_sample(payloads, about)
    except (ValueError, RecursionError) as error:
        return str(error), content
    if length != index.lengths[i]:
        return f"is {length} long, the index says {index.lengths[i]}", content
    return "", content


def read_members(file: BinaryIO, index: ShardIndex, i: int) -> tuple[dict[str, bytes], list[str]]:
    """Members of sample i by field, and the fields whose bytes have changed."""
    payloads, changed = {}, []
    checksum = checksum_of(index.checksum)
    width = len(index.fields)
    for name, j in zip(index.fields, range(i * width, (i + 1) * width), strict=True):
        if not index.offsets[j]:  # it has no such member
            continue
        file.seek(index.offsets[j])
        payloads[name] = file.read(index.sizes[j])
        if checksum and checksum(payloads[name]) != index.checksums[j]:
            changed.append(name)
    return payloads, changed


def _repeated(shards: ShardSet, checked: Sequence[Checked], kind: str, what: str) -> Iterator[str]:
    """Samples that agree in a hash with one before them; hashes, for sets have many millions."""
    hashes = [np.frombuffer(getattr(one, kind), np.uint64) for one in checked]
    bounds = np.cumsum([0, *map(len, hashes)])
    together: NDArray[np.uint64] = np.concatenate(hashes)
    order = np.argsort(together, kind="stable")
    twins = np.flatnonzero(together[order[1:]] == together[order[:-1]])
    for at in twins[:MAX_LINES]:
        first, again = (_locate(shards, bounds, int(order[at + i])) for i in (0, 1))
        yield f"{again[0]}: sample {again[1]!r}: {what} is also that of {first[1]!r} in {first[0]}"
    if len(twins) > MAX_LINES:
        yield f"and {len(twins) - MAX_LINES} more samples of which {what} is that of another"


def _locate(shards: ShardSet, bounds: NDArray[np.int64], position: int) -> tuple[str, str]:
    """(shard, key) of a sample by its position in the set."""
    at = int(np.searchsorted(bounds, position, side="right")) - 1
    shard = shards.shards[at]
    return shard.name, read_index(shards.index(shard)).key(position - int(bounds[at]))
