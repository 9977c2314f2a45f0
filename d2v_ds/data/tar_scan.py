"""The members of a tar from its headers: a scan that skips payloads and detects damage.

    file -> members (name, offset, size) -> samples, grouped as WebDataset does

webdataset and tarfile stop silently at the first damaged header; here that is an error. Formats:
ustar, pax and GNU long names (POSIX.1-2017, pax; GNU tar's manual). Standard library only.
"""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Iterable, Iterator
from typing import BinaryIO, NamedTuple

BLOCK = tarfile.BLOCKSIZE
PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
ERRORS = "backslashreplace"  # keeps names that are not UTF-8 distinct
MAX_NAME = 1 << 20  # bytes of a long name or of pax headers; larger values mean damage


NAME = re.compile(r"((?:.*/)?[^.]+)\.([^/]*)", re.DOTALL)
META = re.compile(r"__[^/]*__(/|$)")


class Member(NamedTuple):
    name: str
    offset: int  # of the payload
    size: int


class DamagedTar(ValueError):
    """The damage and its offset, without the file's name."""

    def __init__(self, reason: str, offset: int) -> None:
        super().__init__(f"{reason} at byte {offset}")
        self.offset = offset


def members(file: BinaryIO, start: int = 0, end: int | None = None) -> Iterator[Member]:
    """The regular files of the tar in bytes `start` to `end` of a file.

    Raises DamagedTar for a damaged header, a payload that extends past the end, and a missing
    end-of-archive mark.
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
            raise DamagedTar("zeros, or the end of one of several concatenated archives,", at)
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", ERRORS)
        except tarfile.HeaderError as error:
            raise DamagedTar(f"damaged header ({error})", at) from None
        size = int(pax.get("size", header.size))
        if not 0 <= size <= end - at - BLOCK:
            raise DamagedTar(f"{header.name}: its {size} bytes extend past the end", at)
        payload, at = at + BLOCK, at + BLOCK + -(-size // BLOCK) * BLOCK
        if header.type == tarfile.GNUTYPE_LONGNAME:
            long_name = _read(file, payload, size).rstrip(b"\0").decode("utf-8", ERRORS)
        elif header.type in PAX:
            pax = _pax(_read(file, payload, size), payload)
        elif header.type not in (tarfile.XGLTYPE, tarfile.GNUTYPE_LONGLINK):
            if header.isreg():
                yield Member(pax.get("path", "") or long_name or header.name, payload, size)
            long_name, pax = "", {}


def next_header(file: BinaryIO, offset: int) -> int | None:
    """The offset of the next intact header after a damaged one; None if there is none."""
    at = offset + BLOCK
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
    """(key, member of each field), grouped as webdataset does: a name is split at the first dot
    after its last slash, fields are lower case, adjacent members with the same key form a sample,
    and `__meta__` is ignored. A field that a sample already has begins the next sample."""
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
    """Whether there are only zeros from the file's position to `end`, as after the last member."""
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
