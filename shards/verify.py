"""Checks a shard set against its index, member by member: structure, checksums, full decoding.

    set -> one job per shard, over processes -> problems, one line each

webdataset stops silently at the first damaged header. Here the whole tar is scanned, also after
damage, and compared with the index, and every sample is decoded.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from d2v_ds.data.checks import Unusable, kind_of, listed, summary
from d2v_ds.data.checksum import checksum_of
from d2v_ds.data.headers import SIDE_FIELDS
from d2v_ds.data.shard_format import DamagedSet, ShardEntry, ShardSet, open_set
from d2v_ds.data.shard_index import ShardIndex, read_index
from d2v_ds.data.tar_scan import BLOCK, DamagedTar, Member, members, samples
from d2v_ds.errors import UserError
from d2v_ds.files import sha256
from d2v_ds.modalities import REGISTRY, modality_class
from d2v_ds.modalities.base import Modality
from shards.workers import run_jobs

MAX_LINES = 20  # problems that are reported per shard
NOTE = "note: "  # prefix of a line that does not report a problem


@dataclass
class Checked:
    """The result of one shard."""

    name: str
    problems: list[str] = field(default_factory=list)
    keys: bytes = b""  # uint64 hash of each sample's key
    contents: bytes = b""  # uint64 hash of each sample's payload
    bad: Counter[str] = field(default_factory=Counter)  # samples that cannot be used, by kind


def verify(path: Path, processes: int) -> Iterator[str]:
    """Problems of a set, one line each. What the conversion found is only a note, and so are
    duplicate contents, because corpora contain duplicates. Raises UserError if there is no set."""
    try:
        shards = open_set(path, check_tars=False)
    except DamagedSet as error:
        yield str(error)
        return
    if found := summary(shards.about):
        yield NOTE + found
    checked: dict[str, Checked] = {}
    modality = modality_class(shards.modality) if shards.modality in REGISTRY else None
    if modality is None:
        yield (
            f"{NOTE}modality {shards.modality!r} is not installed: structure and checksums are "
            "checked, samples are not decoded"
        )
    jobs = [(shards, shard, modality) for shard in shards.shards]
    for one in run_jobs(verify_shard, jobs, processes):
        yield from (f"{one.name}: {problem}" for problem in one.problems)
        checked[one.name] = one
    order = [checked[shard.name] for shard in shards.shards]
    bad = sum((one.bad for one in order), Counter[str]())
    if bad:
        number = bad.total()
        what = "sample" if number == 1 else "samples"
        yield f"{NOTE}{number} {what} cannot be used{listed(dict(bad.most_common()))}"
    yield from _repeated(shards, order, "keys", "key")
    yield from (NOTE + line for line in _repeated(shards, order, "contents", "content"))


def verify_shard(
    job: tuple[ShardSet, ShardEntry, type[Modality] | None],
) -> Checked:
    """modality: None if it is not installed; then samples are not decoded."""
    shards, shard, modality = job
    packed = modality.packed_extensions if modality else None
    result = Checked(shard.name)
    problems = result.problems
    try:
        index = read_index(shards.index(shard))
    except UserError as error:
        problems.append(str(error))
        return result
    keys = [index.key(i) for i in range(index.count)]
    expected = (shard.samples, shard.bytes, shard.length, shards.fields)
    if (index.count, index.bytes, sum(index.lengths), index.fields) != expected:
        problems.append("its index and index.json differ in samples, bytes, length or fields")
    tar = shards.tar(shard)
    try:
        file = tar.open("rb")
    except OSError as error:
        problems.append(f"{tar.name}: {error.strerror}")
        return result
    indexed = shards.indexed
    with file:
        problems += _check_file(tar, shard, indexed)
        problems += _check_structure(file, index, keys, packed, indexed)
        contents = np.zeros(index.count, np.uint64)
        for i, key in enumerate(keys):
            problem, contents[i] = _check_sample(file, index, i, modality, shards.about)
            if problem:
                contents[i] = 0  # is not compared
                problems.append(f"sample {key!r}: {problem}")
                result.bad[kind_of(problem)] += 1
    result.keys = np.array([_hash(key.encode()) for key in keys], np.uint64).tobytes()
    result.contents = contents.tobytes()
    if len(problems) > MAX_LINES:
        problems[MAX_LINES:] = [f"and {len(problems) - MAX_LINES} more problems"]
    return result


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def _check_file(tar: Path, shard: ShardEntry, indexed: bool) -> Iterator[str]:
    size = tar.stat().st_size
    if size != shard.bytes:
        yield f"has {size} bytes, but index.json has {shard.bytes}"
    elif not indexed and sha256(tar) != shard.sha256:
        yield "its sha256 differs from index.json"


# ---------------------------------------------------------------------------------------- structure


def _check_structure(
    file: BinaryIO,
    index: ShardIndex,
    keys: Sequence[str],
    packed: Mapping[str, str] | None,
    indexed: bool,
) -> Iterator[str]:
    """The members of the tar must be those of the index, and the members of a sample must be
    adjacent. The index of third-party tars may omit members. packed: Modality.packed_extensions;
    None if they are unknown."""
    damage: list[DamagedTar] = []
    found = list(members(file, damage=damage))
    order = sorted(range(len(found)), key=lambda at: found[at].offset)
    starts = [found[at].offset for at in order]
    headers = {offset - BLOCK: i for i, offset in enumerate(index.offsets) if offset}
    for error in damage:
        cell = headers.get(error.offset)
        if cell is None:
            yield str(error)
        else:
            yield f"at {_member_name(index, keys, packed or {}, cell)[0]}: {error}"
    damaged = {error.offset for error in damage}
    used = set()
    for i, offset in enumerate(index.offsets):
        if not offset or offset - BLOCK in damaged:  # the sample has no such member
            continue
        last = bisect_right(starts, offset)
        # Several members have the same payload if some are links.
        first = bisect_left(starts, starts[last - 1]) if last else 0
        held = [at for at in order[first:last] if _is_in(index, keys, packed, i, found[at])]
        used.update(held[:1])
        if not held:
            name, _ = _member_name(index, keys, packed or {}, i)
            member = found[order[last - 1]] if last else Member("nothing", 0, 0)
            yield (
                f"the index expects {name} ({index.sizes[i]} bytes) at byte {offset}, but the tar "
                f"has {member.name} ({member.size} bytes) at byte {member.offset}"
            )
            used.update(order[first:last])
    if not indexed:
        for at in sorted(set(range(len(found))) - used):
            yield f"{found[at].name} at byte {found[at].offset - BLOCK} is not in the index"
    groups = Counter(key for key, _ in samples(found))
    for key in (key for key, number in groups.items() if number > 1):
        yield f"the members of {key!r} are not adjacent, or the key occurs twice"


def _is_in(
    index: ShardIndex,
    keys: Sequence[str],
    packed: Mapping[str, str] | None,
    i: int,
    member: Member,
) -> bool:
    """Whether cell i of the index is this member, or a row of it."""
    offset, size = index.offsets[i], index.sizes[i]
    inside = member.offset <= offset <= offset + size <= member.offset + member.size
    name, is_row = _member_name(index, keys, packed or {}, i)
    if member.name == name or _cut(member.name) == _cut(name):
        return inside and (is_row or (member.offset, member.size) == (offset, size))
    # A field of an unknown modality may be packed.
    row_of = keys[i // len(index.fields)].rpartition("/")[0]
    return inside and packed is None and bool(row_of) and _cut(member.name)[0] == row_of


def _member_name(
    index: ShardIndex, keys: Sequence[str], packed: Mapping[str, str], i: int
) -> tuple[str, bool]:
    """(name of the member that holds cell i of the index, whether the cell is a row of it)."""
    row, column = divmod(i, len(index.fields))
    key, extension = keys[row], index.fields[column]
    if extension in packed:
        return f"{key.rpartition('/')[0]}.{packed[extension]}", True
    return f"{key}.{extension}", False


def _cut(name: str) -> tuple[str, str]:
    """(key, field) of a member."""
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
) -> tuple[Exception | None, int]:
    """(the problem of sample i, of the kind that training counts; a hash of its content)."""
    payloads, changed = read_members(file, index, i)
    content = _hash(b"".join(data for name, data in payloads.items() if name not in SIDE_FIELDS))
    try:
        _check_members(index, i, payloads, changed)
        if modality:
            length = modality.check_sample(payloads, about)
            if length != index.lengths[i]:
                reason = f"has length {length}, but the index has {index.lengths[i]}"
                raise Unusable("length", reason)
    except (ValueError, RecursionError) as error:
        return error, content
    return None, content


def _check_members(
    index: ShardIndex, i: int, payloads: Mapping[str, bytes], changed: Sequence[str]
) -> None:
    """Raises Unusable."""
    first = i * len(index.fields)
    for cell, name in enumerate(index.fields, first):
        if len(payloads.get(name, b"")) < index.sizes[cell]:
            raise Unusable("truncated", f"the tar ends within its .{name}")
    if changed:
        reason = f"the checksum of its .{changed[0]} differs from the index"
        raise Unusable("damaged", reason)


def read_members(file: BinaryIO, index: ShardIndex, i: int) -> tuple[dict[str, bytes], list[str]]:
    """({field: payload} of sample i, fields whose checksum is wrong)."""
    payloads, changed = {}, []
    checksum = checksum_of(index.checksum)
    width = len(index.fields)
    for name, j in zip(index.fields, range(i * width, (i + 1) * width), strict=True):
        if not index.offsets[j]:  # the sample has no such member
            continue
        file.seek(index.offsets[j])
        payloads[name] = file.read(index.sizes[j])
        if checksum and checksum(payloads[name]) != index.checksums[j]:
            changed.append(name)
    return payloads, changed


def _repeated(shards: ShardSet, checked: Sequence[Checked], kind: str, what: str) -> Iterator[str]:
    """Samples whose key or content equals that of an earlier sample. Compares hashes, because sets
    have millions of samples."""
    hashes = [np.frombuffer(getattr(one, kind), np.uint64) for one in checked]
    bounds = np.cumsum([0, *map(len, hashes)])
    joined: NDArray[np.uint64] = np.concatenate(hashes)
    order = np.argsort(joined, kind="stable")
    same = joined[order[1:]] == joined[order[:-1]]
    twins = np.flatnonzero(same & (joined[order[1:]] != 0))
    for at in twins[:MAX_LINES]:
        first, again = (_locate(shards, bounds, int(order[at + i])) for i in (0, 1))
        yield f"{again[0]}: sample {again[1]!r} has the same {what} as {first[1]!r} in {first[0]}"
    if len(twins) > MAX_LINES:
        yield f"and {len(twins) - MAX_LINES} more samples with the {what} of another sample"


def _locate(shards: ShardSet, bounds: NDArray[np.int64], sample_id: int) -> tuple[str, str]:
    """(shard, key) of a sample by its number in the set."""
    at = int(np.searchsorted(bounds, sample_id, side="right")) - 1
    shard = shards.shards[at]
    return shard.name, read_index(shards.index(shard)).key(sample_id - int(bounds[at]))
