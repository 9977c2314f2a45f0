"""Bytes of text files: byte ranges that end between documents, lines, paragraphs.

Lines end at "\\n" or "\\r\\n": `str.splitlines` would also cut at U+2028 and other characters of
texts. If "\\r" alone ends the lines of a file, it is read as "\\n" (line_ends.py). A line is given
with "\\n", whatever ends it.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import cast

from d2v_ds.data.checks import Finding, Unusable
from shards.encoding import BOM
from shards.family import Input
from shards.line_ends import NEWLINE, Returns, with_newlines
from shards.text.compressed import COMPRESSED, Decompressed, open_compressed
from shards.walking import extension_of

PART = 4_000_000  # approximate bytes of a file per part
LONGEST = 16_000_000  # bytes of a line or a document that are held in memory
LARGEST = 128_000_000  # bytes of a line that are used; a few MB of .gz can hold one of many GB
LF = NEWLINE[0]
RETURN_NEWLINE = b"\r\n"
BUFFER = 1 << 16


def open_bytes(path: Path) -> io.BufferedReader:
    """A file, decompressed if its extension says so, whose lines end with a newline. Raises
    OSError, and UserError if the package for that is not installed."""
    if extension_of(path.name) in COMPRESSED:
        return with_newlines(io.BufferedReader(open_compressed(path), BUFFER))
    return with_newlines(path.open("rb"))


def damage(file: io.BufferedReader) -> str:
    """Why a compressed file ended before its end; "" if it did not."""
    raw = cast(object, file.raw)
    if isinstance(raw, Returns):
        return damage(raw.file)
    return raw.damage if isinstance(raw, Decompressed) else ""


def check_end(file: io.BufferedReader) -> None:
    """Raises Unusable if a file that was read to its end is damaged there."""
    if reason := damage(file):
        raise Unusable(
            "damaged", f"cannot be read to its end ({reason}); only the text before is used"
        )


def byte_ranges(file: io.BufferedReader, size: int, blank: bool) -> Iterator[tuple[int, int]]:
    """(start, end) of ranges of about PART bytes that end after a newline (blank: after an empty
    line)."""
    start = 0
    while start < size:
        file.seek(min(start + PART, size))
        _skip_line(file)  # the rest of a line
        while blank and _skip_line(file):
            pass
        yield start, file.tell()
        start = file.tell()


def _skip_line(file: io.BufferedReader) -> bool:
    """Reads to the end of a line, however long; returns whether it has more than white space."""
    content = False
    while piece := file.readline(PART):
        content = content or bool(piece.strip())
        if piece.endswith(NEWLINE):
            break
    return content


def lines(
    file: io.BufferedReader, part: Input, findings: list[Finding]
) -> Iterator[tuple[str, bytes]]:
    """(where, line without its newline), without blank lines. A line that is too long becomes
    several documents."""
    inside = False  # a line that is too long
    for offset, line, ends in _raw_lines(file, part, findings):
        if not ends and not inside:
            findings.append(_cut_finding(part, offset))
        inside = not ends
        if line.strip():
            yield f", byte {offset}", line.removesuffix(NEWLINE)


def rows(
    file: io.BufferedReader, part: Input, findings: list[Finding]
) -> Iterator[tuple[str, bytes]]:
    """As `lines`, but a line that is too long is left out, because a part of a row is not a row."""
    inside = False  # a line that is too long
    for offset, line, ends in _raw_lines(file, part):
        if not ends and not inside:
            reason = f"is longer than {LONGEST:,} bytes"
            findings.append(Finding(f"{part.path}, byte {offset}", reason, "size"))
        if ends and not inside and line.strip():
            yield f", byte {offset}", line.removesuffix(NEWLINE)
        inside = not ends


def paragraphs(
    file: io.BufferedReader, part: Input, findings: list[Finding]
) -> Iterator[tuple[str, bytes]]:
    """(where, the lines between blank lines, without the last newline). A paragraph that is too
    long becomes several documents."""
    for start, data in _joined(file, part, findings, blank=True):
        yield f", byte {start}", data.removesuffix(NEWLINE)


def whole(
    file: io.BufferedReader, part: Input, findings: list[Finding]
) -> Iterator[tuple[str, bytes]]:
    """("", the content of the file). A file that is too long becomes several documents."""
    for start, data in _joined(file, part, findings, blank=False):
        yield f", byte {start}" if start else "", data


def _joined(
    file: io.BufferedReader, part: Input, findings: list[Finding], blank: bool
) -> Iterator[tuple[int, bytes]]:
    """(offset, lines) of a file, or of each of its paragraphs if `blank`."""
    start, size, found = 0, 0, list[bytes]()
    inside = False  # a document that is too long
    for offset, line, _ in _raw_lines(file, part, findings):
        ends = blank and not line.strip()
        if found and (ends or size + len(line) > LONGEST):
            yield start, b"".join(found)
            if not ends and not inside:
                findings.append(_cut_finding(part, start))
            inside = not ends
            size, found = 0, []
        if not ends:
            start = start if found else offset
            found.append(line)
            size += len(line)
    if found:
        yield start, b"".join(found)


def _raw_lines(
    file: io.BufferedReader, part: Input, findings: list[Finding] | None = None
) -> Iterator[tuple[int, bytes, bool]]:
    """(offset, line, True) of a part, without a byte order mark and without a last line that is
    incomplete because the file is damaged. Of a line that is too long (offset, piece, whether it is
    the last one), up to LARGEST bytes. findings: what is left out of such a line is appended."""
    offset, size = part.bytes or (0, None)
    if offset:
        file.seek(offset)
    end, rest, cut = None if size is None else offset + size, b"", 0
    while end is None or offset < end:
        if cut >= LARGEST:
            if findings is not None:
                findings.append(_rest_finding(part, offset))
            yield offset, b"", True
            offset, rest, cut = offset + len(rest) + _skipped(file), b"", 0
            continue
        line = rest + file.readline(LONGEST - len(rest)) if rest else file.readline(LONGEST)
        if not line:
            break
        rest, ends = b"", True
        if line[-1] != LF:
            if len(line) == LONGEST and file.peek(1):
                at, ends = _place_to_cut(line), False
                line, rest = line[:at], line[at:]
            elif damage(file):
                break
        cut = 0 if ends else cut + len(line)
        place, offset = offset, offset + len(line)
        if line.endswith(RETURN_NEWLINE):
            line = line[:-2] + NEWLINE
        yield place, line if place else line.removeprefix(BOM), ends


def _skipped(file: io.BufferedReader) -> int:
    """Reads to the end of a line; returns the number of its bytes."""
    size = 0
    while piece := file.readline(LONGEST):
        size += len(piece)
        if piece[-1] == LF:
            break
    return size


def _place_to_cut(line: bytes) -> int:
    """After the last space, or else between two characters of UTF-8."""
    at = line.rfind(b" ", len(line) // 2) + 1
    if not at:
        at = len(line) - 1
        while at > len(line) - 4 and line[at] & 0xC0 == 0x80:  # the inside of a character
            at -= 1
    return at


def _cut_finding(part: Input, offset: int) -> Finding:
    reason = f"is longer than {LONGEST:,} bytes and was cut into several documents"
    return Finding(f"{part.path}, byte {offset}", reason, "cut")


def _rest_finding(part: Input, offset: int) -> Finding:
    reason = f"the rest of a line that is longer than {LARGEST:,} bytes is not used"
    return Finding(f"{part.path}, byte {offset}", reason, "size")
