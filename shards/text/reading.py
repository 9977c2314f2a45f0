"""Bytes of text files: decompression, byte ranges that end between documents, lines, paragraphs."""

from __future__ import annotations

import gzip
import io
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

from d2v_ds.errors import UserError
from shards.family import Input

COMPRESSED = (".gz", ".zst")
PART = 4_000_000  # approximate bytes of a file per part
BOM = b"\xef\xbb\xbf"


def open_bytes(path: Path) -> IO[bytes]:
    """A file, decompressed if its extension says so. Raises UserError if the package for that is
    not installed."""
    extension = path.suffix.lower()
    if extension == ".gz":
        return cast(IO[bytes], gzip.open(path))
    if extension == ".zst":
        try:
            import zstandard
        except ImportError:
            raise UserError(f"{path}: .zst needs zstandard; run `pip install zstandard`") from None
        file = path.open("rb")
        reader = _ZstdErrors(zstandard.ZstdDecompressor().stream_reader(file, closefd=True))
        return cast(IO[bytes], io.BufferedReader(reader, 1 << 20))
    return path.open("rb")


class _ZstdErrors(io.RawIOBase):
    """Turns the errors of a zstandard reader into ValueError."""

    def __init__(self, reader: Any) -> None:
        self.reader = reader

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        import zstandard

        try:
            return int(self.reader.readinto(buffer))
        except zstandard.ZstdError as error:
            raise ValueError(str(error)) from None

    def close(self) -> None:
        self.reader.close()
        super().close()


def byte_ranges(file: IO[bytes], size: int, blank: bool) -> Iterator[tuple[int, int]]:
    """(start, end) of ranges of about PART bytes that end after a newline (blank: after an empty
    line)."""
    start = 0
    while start < size:
        file.seek(min(start + PART, size))
        file.readline()  # the rest of a line
        while blank and file.readline().strip():
            pass
        yield start, file.tell()
        start = file.tell()


def lines(file: IO[bytes], part: Input) -> Iterator[tuple[str, bytes]]:
    """(where, line without its newline), without blank lines."""
    for offset, line in _raw_lines(file, part):
        if line.strip():
            yield f", byte {offset}", line.removesuffix(b"\n")


def paragraphs(file: IO[bytes], part: Input) -> Iterator[tuple[str, bytes]]:
    """(where, the lines between blank lines, without the last newline)."""
    start, found = 0, list[bytes]()
    for offset, line in _raw_lines(file, part):
        if line.strip():
            start = start if found else offset
            found.append(line)
        elif found:
            yield f", byte {start}", b"".join(found).removesuffix(b"\n")
            found = []
    if found:
        yield f", byte {start}", b"".join(found).removesuffix(b"\n")


def whole(file: IO[bytes], part: Input) -> Iterator[tuple[str, bytes]]:
    """("", the content of the file)."""
    yield "", file.read().removeprefix(BOM)


def _raw_lines(file: IO[bytes], part: Input) -> Iterator[tuple[int, bytes]]:
    """(offset, line) of a part, without a byte order mark."""
    offset, size = part.bytes or (0, None)
    if offset:
        file.seek(offset)
    end = None if size is None else offset + size
    while end is None or offset < end:
        line = file.readline()
        if not line:
            break
        yield offset, line.removeprefix(BOM) if offset == 0 else line
        offset += len(line)
