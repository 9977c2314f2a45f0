"""Files in which a carriage return alone ends a line, as old Macs and some spreadsheets write."""

from __future__ import annotations

import io
from typing import Any, cast

HEAD = 4_096  # bytes that are examined
RETURN, NEWLINE = b"\r", b"\n"


def ends_with_returns(head: bytes) -> bool:
    """Whether the lines of a file that begins with these bytes end with a carriage return alone."""
    return RETURN in head[:-1] and NEWLINE not in head


def with_newlines(file: io.BufferedReader) -> io.BufferedReader:
    """The same file. If a carriage return alone ends its lines, every one is read as a newline;
    places in the file stay the same."""
    try:
        head = file.peek(HEAD)[:HEAD]
    except Exception:
        file.close()
        raise
    if not ends_with_returns(head):
        return file
    return io.BufferedReader(cast(io.RawIOBase, Returns(file)))


class Returns(io.RawIOBase):
    """A file with newlines in place of carriage returns."""

    def __init__(self, file: io.BufferedReader) -> None:
        self.file = file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self.file.seekable()

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self.file.seek(offset, whence)

    def readinto(self, buffer: Any) -> int:
        data = self.file.read(len(buffer)).replace(RETURN, NEWLINE)
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self.file.close()
        super().close()
