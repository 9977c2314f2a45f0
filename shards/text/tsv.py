"""Tab-separated values, as GLUE is distributed: one document per line, nothing is quoted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from d2v_ds.data.checks import Finding
from d2v_ds.errors import suggestion
from shards.family import Input
from shards.findings import of_error
from shards.text import reading
from shards.text.layout import Document, from_row
from shards.text.lines import LineFormat, Pieces

HEADER = ", byte 0"  # where reading.lines finds the first line of a file


class Tsv(LineFormat):
    name = "tsv"
    help = "tab-separated values, .tsv (also .gz, .zst), with a header line or --columns"
    extensions = (".tsv",)
    compressed = True
    in_folders: ClassVar[bool] = False  # a table beside texts rarely holds documents

    @property
    def pieces(self) -> Pieces:
        return reading.lines

    def document(self, text: str) -> tuple[str, dict[str, Any]]:
        return text.removesuffix("\r"), {}

    def documents(self, part: Input, findings: list[Finding]) -> Iterator[Document]:
        names = self.columns_of(part.path)
        for name, line, _ in super().documents(part, findings):
            if name == part.path + HEADER and not self.options.columns:
                continue
            values = line.split("\t")
            try:
                if len(values) != len(names):
                    raise ValueError(f"has {len(values)} columns, expected {len(names)}")
                text, columns = from_row(dict(zip(names, values, strict=True)), self.options)
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
                line = opened.readline().removeprefix(reading.BOM).decode()
            names = line.rstrip("\r\n").split("\t")
        for key in self.options.keys:
            if key not in names:
                raise ValueError(f"has no column {key!r}{suggestion(key, names)}")
        return names
