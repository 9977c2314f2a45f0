"""The members of a tar by its headers alone: a scan that seeks over payloads and misses no damage.

    file -> members (name, where, how large) -> samples as WebDataset groups them

webdataset and tarfile end a tar in silence at the first damaged header; here that is an error.
Formats: ustar, pax and GNU long names, as POSIX.1-2017 (pax) and GNU tar's manual describe them.
Standard library only.
"""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Iterable, Iterator
from typing import BinaryIO, NamedTuple

BLOCK = tarfile.BLOCKSIZE
PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
ERRORS = "backslashreplace"  # what is not UTF-8 in a name is shown so, and names stay apart
MAX_NAME = 1 << 20  # bytes of a long name or of pax headers; more is damage


NAME = re.compile(r"((?:.*/)?[^.]+)\.([^/]*)", re.DOTALL)
META = re.compile(r"__[^/]*__(/|$)")


class Member(NamedTuple):
    name: str
    offset: int  # of the payload
    size: int


class DamagedTar(ValueError):
    """What is wrong, and at which byte; without the file's name."""

    def __init__(self, reason: str, position: int) -> None:
        super().__init__(f"{reason} at byte {position}")
        self.position = position


def members(file: BinaryIO, start: int = 0, end: int | None = None) -> Iterator[Member]:
    """The regular files of the tar that lies in bytes `start` to `end` of a file.

    Raises DamagedTar at a header that is none, a payload past the end, and where the end of the
    archive is not marked.
    """
    end = file.seek(0, os.SEEK_END) if end is None else end
    at, long_name, pax = start, "", dict[str, str]()
    while True:
        file.seek(at)
        block = file.read(min(BLOCK, max(0, end - at)))
        if len(block) < BLOCK:
            raise DamagedTar("ends without its end-of-archive mark", at)
        if not block.strip(b"\0"):
            if _all_zero(file, end):
                return
            raise DamagedTar("zeros, or the end of one of several archives,", at)
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", ERRORS)
        except tarfile.HeaderError as error:
            raise DamagedTar(f"damaged header ({error})", at) from None
        size = int(pax.get("size", header.size))
        if not 0 <= size <= end - at - BLOCK:
            raise DamagedTar(f"{header.name}: its {size} bytes reach past the end", at)
        payload, at = at + BLOCK, at + BLOCK + -(-size // BLOCK) * BLOCK
        if header.type == tarfile.GNUTYPE_LONGNAME:
            long_name = _read(file, payload, size).rstrip(b"\0").decode("utf-8", ERRORS)
        elif header.type in PAX:
            pax = _pax(_read(file, payload, size), payload)
        elif header.type not in (tarfile.XGLTYPE, tarfile.GNUTYPE_LONGLINK):
            if header.isreg():
                yield Member(pax.get("path", "") or long_name or header.name, payload, size)
            long_name, pax = "", {}


def next_header(file: BinaryIO, position: int) -> int | None:
    """Where the next sound header lies behind a damaged one, None if there is none."""
    at = position + BLOCK
    file.seek(at)
    while len(block := file.read(BLOCK)) == BLOCK:
        try:
            if block[257:262] == b"ustar":
                tarfile.TarInfo.frombuf(block, "utf-8", ERRORS)
                return at
        except tarfile.HeaderError:
            pass
        at += BLOCK
    return None


def samples(found: Iterable[Member]) -> Iterator[tuple[str, dict[str, Member]]]:
    """(key, member of each field) as webdataset groups them: a name is cut at the first dot behind
    its last slash, fields are lower case, neighbours form a sample, and `__meta__` is left out. A
    field that a sample has already begins the next one."""
    key, group = "", dict[str, Member]()
    for member in found:
        cut = NAME.fullmatch(member.name)
        if not cut or META.match(member.name):
            continue
        field = cut[2].lower()
        if group and (cut[1] != key or field in group):
            yield key, group
            group = {}
        key = cut[1]
        group[field] = member
    if group:
        yield key, group


def _all_zero(file: BinaryIO, end: int) -> bool:
    """From the file's position to `end`: behind the end of an archive lies padding only."""
    while (left := end - file.tell()) > 0:
        data = file.read(min(left, 1 << 20))
        if not data or data.strip(b"\0"):
            return not data
    return True


def _read(file: BinaryIO, at: int, size: int) -> bytes:
    if size > MAX_NAME:
        raise DamagedTar(f"a name of {size} bytes", at)
    file.seek(at)
    return file.read(size)


def _pax(data: bytes, at: int) -> dict[str, str]:
    """Records `LENGTH KEY=VALUE\\n`."""
    records, rest = {}, data
    while rest.strip(b"\0"):
        digits, space, _ = rest.partition(b" ")
        if not space or not digits.isdigit() or not 0 < int(digits) <= len(rest):
            raise DamagedTar("damaged pax header", at)
        key, _, value = rest[len(digits) + 1 : int(digits) - 1].partition(b"=")
        records[key.decode("utf-8", ERRORS)] = value.decode("utf-8", ERRORS)
        rest = rest[int(digits) :]
    return records
