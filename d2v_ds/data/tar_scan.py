"""The members of a tar from its headers: a scan that skips payloads and detects damage.

    file -> members (name, offset, size) -> samples, grouped as WebDataset does

webdataset and tarfile stop silently at the first damaged header; here that is an error. They also
skip links and stop at the end of the first of several concatenated archives; here a link is a
member with the payload of its target (tar_links.py), and all archives are read. Formats: ustar, pax
and GNU long names (POSIX.1-2017, pax; GNU tar's manual). Standard library only.
"""

from __future__ import annotations

import os
import posixpath
import re
import tarfile
from collections.abc import Collection, Iterable, Iterator
from typing import BinaryIO, NamedTuple

from d2v_ds.data.checks import Finding
from d2v_ds.data.tar_links import LinkTable, Problem

BLOCK = tarfile.BLOCKSIZE
RECORD = tarfile.RECORDSIZE  # archives are padded with zeros to a multiple of this
PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
LINKS = (tarfile.LNKTYPE, tarfile.SYMTYPE)
# Without a payload, whatever size their header states.
NO_PAYLOAD = (*LINKS, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE)
SPECIAL = (tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE)
NO_FILES = (tarfile.DIRTYPE, b"D", b"V")  # folders, also with GNU's list of files; volume labels
ERRORS = "backslashreplace"  # keeps names that are not UTF-8 distinct
MAX_NAME = 1 << 16  # bytes of a long name; larger values mean damage
MAX_PAX = 1 << 20  # bytes of the records of a member
DIGITS = 20  # of a size; 2^64 has as many
NEWLINE = ord("\n")
UNUSED = "no sample uses this member of the tar"
SPARSE = Problem(
    "format",
    "is stored as a sparse file, in pieces; unpack the tar and pack it again without --sparse",
)
NO_CONTENT = Problem("type", "is a pipe or device")
CONTINUED = Problem("format", "is continued from another volume of the tar; join the volumes")

NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL)
META = re.compile(r"__[^/]*__(/|$)")


class Member(NamedTuple):
    name: str
    offset: int  # of the payload
    size: int
    problem: Problem | None = None  # why its payload cannot be read; then it has no offset


class DamagedTar(ValueError):
    """The damage and its offset, without the file's name."""

    def __init__(self, reason: str, offset: int) -> None:
        super().__init__(f"{reason} at byte {offset}")
        self.offset = offset


Entry = tuple[str, int, int, bytes, str, bool]
"""A member of any type: name, offset, size, type in its header, target of a link, is sparse."""


def members(
    file: BinaryIO, start: int = 0, end: int | None = None, damage: list[DamagedTar] | None = None
) -> Iterator[Member]:
    """The regular files of the tar in bytes `start` to `end` of a file, and the links to them.

    A sparse file, a link without a target, a pipe and a device have a `problem`. Links to folders
    are left out. A type that is not known is read as a file, as POSIX says.
    Raises DamagedTar for a damaged header, a payload that extends past the end, and a missing
    end-of-archive mark. If `damage` is given, appends these to it and continues at the next intact
    header.
    """
    table: LinkTable | None = None
    for name, offset, size, kind, link, sparse in entries(file, start, end, damage):
        if sparse:
            yield Member(name, 0, 0, SPARSE)
        elif kind in LINKS:
            if table is None:  # a second scan, because targets may follow their links
                table = LinkTable(entries(file, start, end, []))
            target = table.target(name, offset, link, kind == tarfile.SYMTYPE)
            if isinstance(target, Problem):
                yield Member(name, 0, 0, target)
            elif target:
                yield Member(name, *target)
        elif kind in SPECIAL:
            yield Member(name, 0, 0, NO_CONTENT)
        elif kind == b"M":
            yield Member(name, 0, 0, CONTINUED)
        elif kind not in NO_FILES:
            yield Member(name, offset, size)


def entries(
    file: BinaryIO, start: int, end: int | None, damage: list[DamagedTar] | None
) -> Iterator[Entry]:
    """All members of the tar; the parameters are those of `members`."""
    at: int | None = start
    while at is not None and (end is None or at < end or at == start):
        try:
            yield from _entries(file, at, end)
            return
        except DamagedTar as error:
            if damage is None:
                raise
            damage.append(error)
            at = next_header(file, error.offset)


def _entries(file: BinaryIO, start: int, end: int | None) -> Iterator[Entry]:
    end = file.seek(0, os.SEEK_END) if end is None else end
    at, long_name, long_link, pax = start, "", "", dict[str, str]()
    while True:
        file.seek(at)
        block = file.read(min(BLOCK, max(0, end - at)))
        if len(block) < BLOCK:
            raise DamagedTar("ends without its end-of-archive mark", at)
        if not block[0] and not block.strip(b"\0"):
            following = _after_zeros(file, start, at, end)
            if following is None:
                return
            start = at = following
            continue
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", ERRORS)
        except tarfile.HeaderError as error:
            raise DamagedTar(f"damaged header ({error})", at) from None
        kind = header.type
        size = 0 if kind in NO_PAYLOAD else _size(pax.get("size"), header.size)
        if size < 0:
            raise DamagedTar(f"{header.name}: its size is no number of bytes", at)
        if size > end - at - BLOCK:
            raise DamagedTar(f"{header.name}: its {size} bytes extend past the end", at)
        payload = at + BLOCK
        if kind == tarfile.GNUTYPE_SPARSE:
            payload = _after_sparse_map(file, block, payload)
        at = payload + -(-size // BLOCK) * BLOCK
        if kind == tarfile.GNUTYPE_LONGNAME:
            long_name = _read(file, payload, size).rstrip(b"\0").decode("utf-8", ERRORS)
        elif kind == tarfile.GNUTYPE_LONGLINK:
            long_link = _read(file, payload, size).rstrip(b"\0").decode("utf-8", ERRORS)
        elif kind in PAX:
            pax = _pax(_read(file, payload, size, MAX_PAX), payload)
        elif kind != tarfile.XGLTYPE:
            name = pax.get("path", "") or long_name or header.name
            if pax:
                name = pax.get("GNU.sparse.name", name)
            link = pax.get("linkpath", "") or long_link or header.linkname
            sparse = kind == tarfile.GNUTYPE_SPARSE or any(map(_is_sparse, pax))
            yield name, payload, size, kind, link, sparse
            long_name, long_link, pax = "", "", {}


def _is_sparse(key: str) -> bool:
    """Whether a pax record belongs to a sparse file (GNU tar, bsdtar and star)."""
    return key.startswith("GNU.sparse.") or key == "SCHILY.realsize"


def _after_sparse_map(file: BinaryIO, header: bytes, at: int) -> int:
    """The offset of the payload of a sparse file in GNU's old format, after the blocks that
    continue its map (GNU tar's manual, struct sparse_header)."""
    more = header[482]
    while more:
        file.seek(at)
        block = file.read(BLOCK)
        at += BLOCK
        more = len(block) == BLOCK and block[504]
    return at


def next_header(file: BinaryIO, offset: int) -> int | None:
    """The offset of the next intact header after a damaged one; None if there is none."""
    at = offset + BLOCK
    file.seek(at)
    while len(block := file.read(BLOCK)) == BLOCK:
        if block[257:262] == b"ustar" and is_header(block):
            return at
        at += BLOCK
    return None


def samples(
    found: Iterable[Member], unused: list[Member] | None = None
) -> Iterator[tuple[str, dict[str, Member]]]:
    """(key, member of each field), grouped as webdataset does: a name is split at the first dot
    after its last slash, fields are lower case, adjacent members with the same key form a sample,
    and `__meta__` is ignored. A field that a sample already has begins the next sample. Unlike in
    webdataset, hidden files have no key: macOS stores `x/._a.wav` next to `x/a.wav`, which would be
    the field `_a.wav` of a sample `x/`. unused: a list to which members without a key, pipes and
    devices are appended."""
    key, group = "", dict[str, Member]()
    for member in found:
        cut = key_of(member.name)
        if not cut or member.problem is NO_CONTENT:
            if unused is not None:
                unused.append(member)
            continue
        field = cut[2].lower()
        if group and (cut[1] != key or field in group):
            yield key, group
            group = {}
        key = cut[1]
        group[field] = member
    if group:
        yield key, group


def key_of(name: str) -> re.Match[str] | None:
    """(key, field) of a member as groups 1 and 2; None if it belongs to no sample."""
    return None if META.match(name) else NAME.fullmatch(name)


def about_unused(member: Member, prefix: str = "") -> Finding:
    """The finding about a member that no sample uses."""
    if posixpath.basename(member.name).startswith("."):
        return Finding(prefix + member.name, "its name begins with a dot", "hidden")
    if member.problem is NO_CONTENT:
        return Finding(prefix + member.name, NO_CONTENT.reason, NO_CONTENT.kind)
    return Finding(prefix + member.name, UNUSED, "unused")


def without_dots(key: str, group: Iterable[str], fields: Collection[str]) -> str:
    """What to rename if none of the fields of a sample is one of `fields`, but one ends in it after
    a dot, as in `talk v1.0.flac`; "" if that is not the reason."""
    for field in group:
        if field.rpartition(".")[2] in fields and "." in field:
            return (
                f"; WebDataset cuts the name {key}.{field} at its first dot: replace the other "
                "dots, for example by _"
            )
    return ""


def _after_zeros(file: BinaryIO, start: int, at: int, end: int) -> int | None:
    """The offset of the next of several concatenated archives, after a block of zeros at byte
    `at`; None if there are only zeros up to the end. Raises DamagedTar if the zeros are not those
    at the end of an archive, which began at byte `start`."""
    header = at + BLOCK
    file.seek(header)
    while header < end:
        block = file.read(min(BLOCK, end - header))
        if not block:
            return None
        if block.strip(b"\0"):
            break
        header += BLOCK
    else:
        return None
    padded = header - at == 2 * BLOCK or (
        (header - start) % RECORD == 0 and header - at < 3 * RECORD
    )
    if header - at >= 2 * BLOCK and padded and is_header(block):
        return header
    raise DamagedTar("zeros instead of a header", at)


def is_header(block: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", ERRORS)
    except tarfile.HeaderError:
        return False
    return block[257:262] == b"ustar"


def _read(file: BinaryIO, at: int, size: int, most: int = MAX_NAME) -> bytes:
    if size > most:
        raise DamagedTar(f"a name of {size} bytes", at)
    file.seek(at)
    return file.read(size)


def _size(record: str | None, stated: int) -> int:
    """Bytes of a payload: what the pax record says, else the header; -1 for a record that is no
    number."""
    if record is None:
        return stated
    return int(record) if record.isascii() and record.isdigit() and len(record) <= DIGITS else -1


def _pax(data: bytes, at: int) -> dict[str, str]:
    """Records `LENGTH KEY=VALUE\\n`."""
    data, records, start = data.rstrip(b"\0"), {}, 0
    while start < len(data):
        space = data.find(b" ", start, start + DIGITS)
        digits = data[start : max(start, space)]
        stop = start + int(digits) if digits.isdigit() else 0
        if not space + 1 < stop <= len(data) or data[stop - 1] != NEWLINE:
            raise DamagedTar("damaged pax header", at)
        key, _, value = data[space + 1 : stop - 1].partition(b"=")
        records[key.decode("utf-8", ERRORS)] = value.decode("utf-8", ERRORS)
        start = stop
    if len(records.get("path", "")) > MAX_NAME or len(records.get("linkpath", "")) > MAX_NAME:
        raise DamagedTar(f"a name of more than {MAX_NAME} characters", at)
    return records
