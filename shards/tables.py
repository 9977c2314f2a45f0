"""Tab-separated tables with a header line, one row at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from d2v_ds.errors import UserError
from shards.line_ends import with_newlines
from shards.walking import extension_of

LONGEST_HEADER = 1 << 16  # bytes


def header(path: Path) -> list[str]:
    """The cells of the first line; [] if the file is not a .tsv."""
    if not path.is_file() or extension_of(path.name) != ".tsv":
        return []
    with with_newlines(path.open("rb")) as file:
        line = file.readline(LONGEST_HEADER).decode("utf-8-sig", "replace")
    return line.rstrip("\r\n").split("\t")


def lines_of(path: Path) -> Iterator[tuple[int, str]]:
    """(line number from 1, line without its end). Raises UserError if the file is not UTF-8."""
    with with_newlines(path.open("rb")) as file:
        for number, raw in enumerate(file, start=1):
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"{path}, line {number}: is not UTF-8 ({error.reason})") from None
            yield number, line.rstrip("\r\n")


def rows(path: Path, needed: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, row by column). Raises UserError if the header lacks the column `needed` or
    names a column twice, and if a row and the header differ in length."""
    columns: list[str] = []
    rule = f"the first line must name the columns, separated by TAB, including `{needed}`"
    for number, line in lines_of(path):
        if not columns:
            columns = line.split("\t")
            if needed not in columns or len(set(columns)) != len(columns):
                raise UserError(f"{path}: {rule}, without duplicates; found {line[:200]!r}")
        elif line:
            cells = line.split("\t")
            if len(cells) != len(columns):
                raise UserError(
                    f"{path}, line {number}: {len(cells)} columns, but the header has "
                    f"{len(columns)}"
                )
            yield number, dict(zip(columns, cells, strict=True))
    if not columns:
        raise UserError(f"{path}: {rule}; the file is empty")
