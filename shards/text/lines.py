"""The common part of plain text and JSON lines: files of lines, cut into parts between documents.

A compressed file cannot be read from the middle, so it is one part.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import IO, Any

from d2v_ds.data.checks import Finding
from shards.family import Input
from shards.findings import of_error
from shards.text import reading
from shards.text.layout import Document, TextFormat
from shards.walking import extension_of

Pieces = Callable[[IO[bytes], Input], Iterator[tuple[str, bytes]]]


class LineFormat(TextFormat, abstract=True):
    @property
    @abstractmethod
    def pieces(self) -> Pieces:
        """How a part is cut into documents: (open file, part) -> (where, bytes)."""

    @abstractmethod
    def document(self, text: str) -> tuple[str, dict[str, Any]]:
        """(text, columns) of a piece. Raises ValueError if it is unusable."""

    def parts(self, file: str) -> Iterator[tuple[Input, int]]:
        path = self.root / file
        try:
            size = path.stat().st_size
            indivisible = extension_of(file) in reading.COMPRESSED or self.pieces is reading.whole
            if size <= reading.PART or indivisible:
                yield Input(file), size
                return
            with path.open("rb") as opened:
                blank = self.pieces is reading.paragraphs
                for start, end in reading.byte_ranges(opened, size, blank):
                    yield Input(file, (start, end - start)), end - start
        except OSError:  # the conversion reports the reason
            yield Input(file), 0

    def documents(self, part: Input, findings: list[Finding]) -> Iterator[Document]:
        with reading.open_bytes(self.root / part.path) as file:
            for where, data in self.pieces(file, part):
                name = part.path + where
                try:
                    text, columns = self.document(data.decode())
                except UnicodeDecodeError as error:
                    findings.append(
                        Finding(name, f"is not UTF-8 ({error.reason} at {error.start})", "encoding")
                    )
                except ValueError as error:
                    findings.append(of_error(name, error))
                else:
                    yield name, text, columns
