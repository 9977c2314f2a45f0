"""The common part of plain text, JSON lines and TSV: files of lines, cut into parts between
documents.

A compressed file cannot be read from the middle, so it is one part.
"""

from __future__ import annotations

import io
from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

from d2v_ds.data.checks import Finding, Unusable
from shards.encoding import HEAD, check_head, not_utf8
from shards.family import Input
from shards.findings import of_error
from shards.line_ends import ends_with_returns
from shards.text import reading
from shards.text.compressed import COMPRESSED
from shards.text.layout import Document, TextFormat
from shards.walking import extension_of

Pieces = Callable[[io.BufferedReader, Input, list[Finding]], Iterator[tuple[str, bytes]]]


class LineFormat(TextFormat, abstract=True):
    @property
    @abstractmethod
    def pieces(self) -> Pieces:
        """How a part is cut into documents: (open file, part, findings) -> (where, bytes)."""

    @abstractmethod
    def document(self, text: str) -> tuple[str, dict[str, Any]]:
        """(text, columns) of a piece. Raises ValueError if it is unusable."""

    def divisible(self, file: io.BufferedReader, path: str) -> bool:
        """Whether a document of the file is a number of whole lines. file: at its beginning."""
        return self.pieces is not reading.whole

    def parts(self, file: str) -> Iterator[tuple[Input, int]]:
        path = self.root / file
        try:
            size = path.stat().st_size
            if size <= reading.PART or extension_of(file) in COMPRESSED:
                yield Input(file), size
                return
            with path.open("rb") as opened:
                head = opened.peek(HEAD)[:HEAD]
                divisible = is_text(head) and not ends_with_returns(head)
                if not divisible or not self.divisible(opened, file):
                    yield Input(file), size
                    return
                blank = self.pieces is reading.paragraphs
                for start, end in reading.byte_ranges(opened, size, blank):
                    yield Input(file, (start, end - start)), end - start
        except OSError:  # the conversion reports the reason
            yield Input(file), 0

    def documents(self, part: Input, findings: list[Finding]) -> Iterator[Document]:
        with reading.open_bytes(self.root / part.path) as file:
            if not part.bytes or not part.bytes[0]:
                check_head(file.peek(HEAD)[:HEAD])
            yield from self.pieces_of(file, part, findings)
            reading.check_end(file)

    def pieces_of(
        self, file: io.BufferedReader, part: Input, findings: list[Finding]
    ) -> Iterator[Document]:
        for where, data in self.pieces(file, part, findings):
            name = part.path + where
            try:
                text, columns = self.document(data.decode())
            except UnicodeDecodeError as error:
                findings.append(of_error(name, not_utf8(data, error.start)))
            except ValueError as error:
                findings.append(of_error(name, error))
            else:
                yield name, text, columns


def is_text(head: bytes) -> bool:
    """Whether a file that begins with these bytes can be UTF-8."""
    try:
        check_head(head)
    except Unusable:
        return False
    return True
