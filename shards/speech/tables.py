"""Tab-separated tables with a header line, a row at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from d2v_ds.errors import UserError


def lines_of(path: Path) -> Iterator[tuple[int, str]]:
    """(number from 1, line without its end). Raises UserError where it is not UTF-8."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"{path}, line {number}: is not UTF-8 ({error.reason})") from None
            yield number, line.rstrip("\r\n")


def rows(path: Path, needed: str) -> Iterator[tuple[int, dict[str, str]]]:
    """(line number, row by column). Raises UserError at a row of another length than the header,
    and for a header without the column `needed`."""
    columns: list[str] = []
    for number, line in lines_of(path):
        if not columns:
            columns = line.split("\t")
            if needed not in columns or len(set(columns)) != len(columns):
                raise UserError(
                    f"{path}: its first line must name the columns, separated by TAB, each once, "
                    f"one of them `{needed}`; it is {line[:200]!r}"
                )
        elif line:
            cells = line.split("\t")
            if len(cells) != len(columns):
                raise UserError(
                    f"{path}, line {number}: {len(cells)} columns, the header has {len(columns)}"
                )
            yield number, dict(zip(columns, cells, strict=True))
    if not columns:
        raise UserError(
            f"{path}: its first line must name the columns, separated by TAB, one of them "
            f"`{needed}`; the file is empty"
        )
