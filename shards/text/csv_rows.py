"""Comma-separated values, in which a quoted value may contain commas, newlines and doubled quotes.

A newline within quotes is not the end of a row, so a file cannot be read from the middle and is one
part.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from typing import ClassVar

from d2v_ds.data.checks import Finding, Unusable
from shards.encoding import BOM, HEAD, check_head
from shards.family import Input
from shards.findings import of_error
from shards.line_ends import NEWLINE
from shards.text import reading, tables
from shards.text.layout import Document, TextFormat


class Csv(TextFormat):
    name = "csv"
    help = "comma-separated values, .csv (also compressed), with a header line or --columns"
    extensions = (".csv",)
    compressed = True
    unlabelled: ClassVar[bool] = False

    def documents(self, part: Input, findings: list[Finding]) -> Iterator[Document]:
        names = list(self.options.columns)
        with reading.open_bytes(self.root / part.path) as file:
            check_head(file.peek(HEAD)[:HEAD])
            for line, values in _rows(file):
                if not names:
                    names = values
                    tables.check_names(names, self.options)
                    continue
                name = f"{part.path}, line {line}"
                try:
                    text, columns = tables.document(names, values, self.options)
                except ValueError as error:
                    findings.append(of_error(name, error))
                else:
                    yield name, text, columns
            reading.check_end(file)


def _rows(file: io.BufferedReader) -> Iterator[tuple[int, list[str]]]:
    """(number of its first line from 1, values) of each row. Raises Unusable, after the rows
    before, at a quote that is not closed, and at a row that is too long."""
    taken: list[str] = []  # lines of the current row
    number, size = 0, 0

    def lines() -> Iterator[str]:
        nonlocal number, size
        while data := file.readline(reading.LONGEST):
            if not data.endswith(NEWLINE) and reading.damage(file):
                return
            number += 1
            size += len(data)
            if size > reading.LONGEST:
                raise Unusable(
                    "size",
                    f"its row in line {number - len(taken)} is longer than {reading.LONGEST:,} "
                    "bytes; perhaps a quote is not closed. Only the rows before are used",
                )
            # A byte that is not UTF-8 becomes half a surrogate pair: only its row is refused.
            line = data.removeprefix(BOM if number == 1 else b"").decode(errors="surrogateescape")
            taken.append(line)
            yield line

    csv.field_size_limit(reading.LONGEST)
    try:
        for values in csv.reader(lines()):
            if values:
                _check_closed(taken, number)
                yield number - len(taken) + 1, values
            taken.clear()
            size = 0
    except csv.Error as error:
        reason = f"cannot be read from line {number} on ({error}); only the rows before are used"
        raise Unusable("row", reason) from None


def _check_closed(taken: list[str], number: int) -> None:
    """Raises Unusable if the last row of a file ends within quotes."""
    if len(taken) > 1 or taken[0].count('"') % 2:
        try:
            list(csv.reader(taken, strict=True))
        except csv.Error as error:
            if "end of data" in str(error):
                raise Unusable(
                    "row",
                    f"a quote that line {number - len(taken) + 1} opens is not closed; only the "
                    "rows before are used",
                ) from None
