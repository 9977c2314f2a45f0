"""Compressed text files. A damaged file is read up to the damage, which is then reported."""

from __future__ import annotations

import bz2
import io
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from d2v_ds.data.checks import Unusable
from d2v_ds.errors import UserError
from shards.tars import MAGIC

COMPRESSED = (".gz", ".zst", ".xz", ".lzma", ".bz2")
SLICE = 1 << 16  # bytes that are given to a decompressor whose state can be copied
SMALL = 1 << 10  # to another one: the content of the slice with the damage is lost
CONTROL = bytes(set(range(32)) - set(b"\t\n\f\r"))  # bytes that text does not contain
WINDOW = 1 << 31  # bytes; the largest that zstd can be asked to use (--long=31)


class Decompressed(io.RawIOBase):
    """The content of a compressed file, also of one with several streams.

    At damaged data the content ends, and `damage` says why. Reading raises Unusable if the content
    is not of this format at all. make: a new decompressor, with
    `decompress`, `eof` and `unused_data`. name: of the format.
    """

    def __init__(self, file: IO[bytes], make: Callable[[], Any], name: str) -> None:
        self.damage = ""
        self._file, self._make, self._name = file, make, name
        self._decompressor = make()
        self._waiting = memoryview(b"")  # its parts are taken without copying the rest
        self._unread = b""
        self._started = self._ended = self._any = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._waiting and not self._ended:
            self._decompress()
        size = min(len(buffer), len(self._waiting))
        buffer[:size] = self._waiting[:size]
        self._waiting = self._waiting[size:]
        return size

    def _decompress(self) -> None:
        copyable = hasattr(self._decompressor, "copy")
        data = self._unread or self._file.read(SLICE if copyable else SMALL)
        if not data:
            self._ended = True
            if self._started:
                self.damage = "ends early"
            return
        before = self._decompressor.copy() if copyable else None
        first, self._any = not self._any, True
        self._started = True
        try:
            self._waiting = memoryview(self._decompressor.decompress(data))
        except Exception as error:  # each library has its own type; none of them reads a file here
            if first and (other := _other_content(data, self._name)):
                raise Unusable("format", f"is named {self._name}, but {other}") from None
            self._ended = True
            self.damage = f"not valid {self._name} data: {error}"
            self._waiting = memoryview(salvaged(before, data) if before else b"")
            return
        self._unread = b""
        if self._decompressor.eof:
            # Another stream may follow, or zeros, as tar and tapes leave them.
            self._unread = self._decompressor.unused_data.lstrip(b"\0")
            self._decompressor, self._started = self._make(), False

    def close(self) -> None:
        self._file.close()
        super().close()


def _other_content(head: bytes, name: str) -> str:
    """What a file that begins with these bytes is, if it is not compressed as its name says; "" if
    that is unknown."""
    extension = next((other for magic, other in MAGIC.items() if head.startswith(magic)), "")
    if extension and extension != name:
        return f"its content is compressed as {extension}; rename it"
    if not extension and head.translate(None, CONTROL) == head:
        return "its content is not compressed; rename it without this extension"
    return ""


def salvaged(decompressor: Any, data: bytes) -> bytes:
    """The content before the byte at which the decompressor fails."""
    found = []
    try:
        for i in range(len(data)):
            found.append(decompressor.decompress(data[i : i + 1]))
    except zlib.error:
        pass
    return b"".join(found)


def open_compressed(path: Path) -> Decompressed:
    """Opens a file with an extension in COMPRESSED. Raises OSError, and UserError if the package
    for the format is not installed."""
    extension = path.suffix.lower()
    make: Callable[[], Any]
    if extension == ".gz":
        make = _gzip
    elif extension == ".bz2":
        make = bz2.BZ2Decompressor
    elif extension in (".xz", ".lzma"):
        make = lzma.LZMADecompressor
    else:
        try:
            import zstandard
        except ImportError:
            raise UserError(f"{path}: .zst needs zstandard; run `pip install zstandard`") from None
        make = zstandard.ZstdDecompressor(max_window_size=WINDOW).decompressobj
    return Decompressed(path.open("rb"), make, extension)


def _gzip() -> Any:
    return zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
