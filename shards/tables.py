"""Tab-separated tables with a header line, one row at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from d2v_ds.data.checks import Unusable
from d2v_ds.errors import UserError
from shards.encoding import HEAD, check_head, not_utf8
from shards.line_ends import with_newlines
from shards.walking import extension_of

LONGEST_HEADER = 1 << 16  # bytes
LONGEST = 1 << 24  # bytes of a line


def header(path: Path) -> list[str]:
    """The cells of the first line; [] if the file is not a .tsv."""
    if not path.is_file() or extension_of(path.name) != ".tsv":
        return []
    with with_newlines(path.open("rb")) as file:
        line = file.readline(LONGEST_HEADER).decode("utf-8-sig", "replace")
    return line.rstrip("\r\n").split("\t")


def lines_of(path: Path) -> Iterator[tuple[int, str]]:
    """(line number from 1, line without its end). Raises UserError if the file is not UTF-8, or a
    line is too long."""
    check_encoding(path)
    with with_newlines(path.open("rb")) as file:
        for number, raw in enumerate(iter(lambda: file.readline(LONGEST), b""), start=1):
            if len(raw) == LONGEST:
                raise too_long(path, number)
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                reason = not_utf8(raw, error.start)
                raise UserError(f"{path}, line {number}: {reason}") from None
            yield number, line.rstrip("\r\n")


def too_long(path: Path, number: int) -> UserError:
    return UserError(f"{path}, line {number}: is longer than {LONGEST:,} bytes; is it a manifest?")


def rows(path: Path, *needed: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, row by column). Raises UserError if the header lacks all of the columns
    `needed` or names a column twice, and if a row and the header differ in length."""
    columns: list[str] = []
    for number, line in lines_of(path):
        if not columns:
            columns = line.split("\t")
            check_columns(path, columns, needed, "TAB")
        elif line:
            cells = line.split("\t")
            if len(cells) != len(columns):
                raise UserError(
                    f"{path}, line {number}: {len(cells)} columns, but the header has "
                    f"{len(columns)}"
                )
            yield number, dict(zip(columns, cells, strict=True))
    if not columns:
        check_columns(path, [], needed, "TAB")


def check_columns(
    path: Path, columns: Sequence[str], needed: Sequence[str], separator: str
) -> None:
    """Raises UserError if the header of a table has none of the columns `needed`, or one twice.
    Columns without a name do not count."""
    named = list(filter(None, columns))
    if not set(needed).isdisjoint(named) and len(set(named)) == len(named):
        return
    raise UserError(
        f"{path}: the first line must name the columns, separated by {separator}, including "
        f"`{'` or `'.join(needed)}`, without duplicates; found {', '.join(columns)[:200] or 'none'}"
        f"{about_separator(columns)}"
    )


def about_separator(columns: Sequence[str]) -> str:
    """What another separator a header seems to have; "" if none."""
    if len(columns) == 1:
        for character, name in (("\t", "TAB"), (";", "`;`"), (",", "`,`"), ("|", "`|`")):
            if character in columns[0]:
                return f". Its columns seem to be separated by {name}"
    return ""


def check_encoding(path: Path) -> None:
    """Raises UserError if a file is UTF-16, UTF-32 or no text."""
    try:
        with path.open("rb") as file:
            check_head(file.read(HEAD))
    except Unusable as error:
        raise UserError(f"{path}: {error}") from None
