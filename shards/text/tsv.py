"""Tab-separated values, as GLUE is distributed: one document per line, nothing is quoted."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any, ClassVar

from d2v_ds.data.checks import Finding
from shards.encoding import BOM, HEAD, check_head
from shards.family import Input
from shards.findings import of_error
from shards.text import reading, tables
from shards.text.layout import Document
from shards.text.lines import LineFormat, Pieces

HEADER = ", byte 0"  # where reading.rows finds the first line of a file


class Tsv(LineFormat):
    name = "tsv"
    help = "tab-separated values, .tsv (also compressed), with a header line or --columns"
    extensions = (".tsv",)
    compressed = True
    unlabelled: ClassVar[bool] = False

    @property
    def pieces(self) -> Pieces:
        return reading.rows

    def document(self, text: str) -> tuple[str, dict[str, Any]]:
        return text, {}

    def pieces_of(
        self, file: io.BufferedReader, part: Input, findings: list[Finding]
    ) -> Iterator[Document]:
        names = self.columns_of(part.path)
        for name, line, _ in super().pieces_of(file, part, findings):
            if name == part.path + HEADER and not self.options.columns:
                continue
            try:
                text, columns = tables.document(names, line.split("\t"), self.options)
            except ValueError as error:
                findings.append(of_error(name, error))
            else:
                yield name, text, columns

    def columns_of(self, file: str) -> list[str]:
        """The names of the columns of a file. Raises ValueError if one that is needed is not among
        them."""
        names = list(self.options.columns)
        if not names:
            with reading.open_bytes(self.root / file) as opened:
                check_head(opened.peek(HEAD)[:HEAD])
                line = opened.readline(reading.LONGEST).removeprefix(BOM)
            # A byte that is not UTF-8 becomes half a surrogate pair, for the message.
            names = line.decode(errors="surrogateescape").rstrip("\r\n").split("\t")
        tables.check_names(names, self.options)
        return names
