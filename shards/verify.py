"""Checks a shard set against its index, member by member: structure, checksums, real decoding.

    set -> one job a shard over processes -> problems, one line each

webdataset ends a shard in silence at the first damaged header; here every header is held against
the index, and what lies behind the damage is still checked through the index.
"""

from __future__ import annotations

import hashlib
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from d2v_ds.errors import UserError
from d2v_ds.shard_format import ShardEntry, ShardIndex, ShardSet, open_set, read_index
from shards import speech
from shards.workers import run_jobs

MAX_LINES = 20  # of problems, a shard

# By modality: the length of a sample, all of it decoded; raises ValueError.
CHECKS: dict[str, Callable[[Mapping[str, bytes], int], int]] = {"speech": speech.check}


def verify(path: Path, processes: int) -> Iterator[str]:
    """Problems of a set, a line each. Raises UserError when there is no set at all."""
    shards = open_set(path, check_tars=False)
    keys: dict[str, str] = {}
    for name, found, problems in run_jobs(
        verify_shard, [(shards, shard) for shard in shards.shards], processes
    ):
        yield from (f"{name}: {problem}" for problem in problems)
        for key in found:
            if keys.setdefault(key, name) != name:
                yield f"{name}: sample {key!r} is also in {keys[key]}"


def verify_shard(job: tuple[ShardSet, ShardEntry]) -> tuple[str, list[str], list[str]]:
    """(name of the shard, its keys, its problems)."""
    shards, shard = job
    problems: list[str] = []
    tar = shards.tar(shard)
    try:
        index = read_index(shards.index(shard))
    except UserError as error:
        return shard.name, [], [str(error)]
    keys = [index.key(i) for i in range(index.count)]
    if (index.count, index.bytes, sum(index.lengths), index.fields) != (
        shard.samples,
        shard.bytes,
        shard.length,
        shards.fields,
    ):
        problems.append("its index and index.json disagree on samples, bytes, length or fields")
    if len(set(keys)) != len(keys):
        problems.append("its index has a key twice")
    try:
        file = tar.open("rb")
    except OSError as error:
        return shard.name, keys, [*problems, f"{tar.name}: {error.strerror}"]
    with file:
        problems += _check_file(file, shard)
        problems += _check_headers(file, index, keys)
        check = CHECKS[shards.modality]
        for i, key in enumerate(keys):
            problem = _check_sample(file, index, i, check, shards.sample_rate)
            if problem:
                problems.append(f"sample {key!r}: {problem}")
    if len(problems) > MAX_LINES:
        problems[MAX_LINES:] = [f"and {len(problems) - MAX_LINES} more problems"]
    return shard.name, keys, problems


def _check_file(file: BinaryIO, shard: ShardEntry) -> Iterator[str]:
    size = file.seek(0, 2)
    if size != shard.bytes:
        yield f"has {size} bytes, index.json says {shard.bytes}"
        return
    file.seek(0)
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    if digest.hexdigest() != shard.sha256:
        yield "its sha256 is not the one in index.json"


def _check_headers(file: BinaryIO, index: ShardIndex, keys: list[str]) -> Iterator[str]:
    """The members of the tar must be those of the index: same names, order, places and sizes, so
    the members of a sample lie together; then two empty blocks."""
    end = 0
    for i, offset in enumerate(index.offsets):
        row, column = divmod(i, len(index.fields))
        name = f"{keys[row]}.{index.fields[column]}"
        file.seek(offset - tarfile.BLOCKSIZE)
        try:
            member = tarfile.TarInfo.frombuf(file.read(tarfile.BLOCKSIZE), "utf-8", "replace")
        except tarfile.HeaderError as error:
            yield f"header of {name} at byte {offset - tarfile.BLOCKSIZE}: {error}"
            member = None
        if offset - tarfile.BLOCKSIZE != end:
            yield f"{name} does not follow the member before it"
        if member and (member.name, member.size) != (name, index.sizes[i]):
            yield (
                f"at byte {offset - tarfile.BLOCKSIZE} lies {member.name} of {member.size} bytes, "
                f"the index says {name} of {index.sizes[i]}"
            )
        end = offset + -(-index.sizes[i] // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    file.seek(end)
    rest = file.read()
    if len(rest) < 2 * tarfile.BLOCKSIZE or rest.strip(b"\0"):
        yield "does not end with two empty blocks after its last member"


def _check_sample(
    file: BinaryIO,
    index: ShardIndex,
    i: int,
    check: Callable[[Mapping[str, bytes], int], int],
    sample_rate: int,
) -> str:
    """What is wrong with sample i, "" if nothing."""
    members, crc = read_members(file, index, i)
    if crc != index.crcs[i]:
        return "its checksum is not the one in the index"
    try:
        length = check(members, sample_rate)
    except ValueError as error:
        return str(error)
    if length != index.lengths[i]:
        return f"is {length} long, the index says {index.lengths[i]}"
    return ""


def read_members(file: BinaryIO, index: ShardIndex, i: int) -> tuple[dict[str, bytes], int]:
    """Members of sample i by field, and their crc32."""
    members, crc = {}, 0
    width = len(index.fields)
    for field, j in zip(index.fields, range(i * width, (i + 1) * width), strict=True):
        file.seek(index.offsets[j])
        members[field] = file.read(index.sizes[j])
        crc = zlib.crc32(members[field], crc)
    return members, crc
