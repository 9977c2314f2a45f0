"""Parquet files, a row group at a time: the one place that knows pyarrow, which is optional."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d2v_ds.errors import UserError

if TYPE_CHECKING:
    from shards.family import Input

TOGETHER = 64  # rows that are decoded at a time


def open_table(path: Path) -> Any:
    """A pyarrow ParquetFile. Raises ValueError when it is none, UserError without pyarrow."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path}: reading Parquet takes `pip install pyarrow`") from None
    try:
        return pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"is no Parquet file ({first_line(error)})") from None


def row_groups(root: Path, file: str) -> Iterator[tuple[Input, int]]:
    """Each as an input, with its bytes; a file that cannot be read as one: reading it says why."""
    from shards.family import Input

    try:
        meta = open_table(root / file).metadata
    except UserError:
        raise
    except ValueError:
        yield Input(file), 0
        return
    first = 0
    for i in range(meta.num_row_groups):
        group = meta.row_group(i)
        yield Input(file, part=(first, first + group.num_rows)), group.total_byte_size
        first += group.num_rows


def rows(table: Any, part: Input, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number in the file, row) of an input that `row_groups` gave. Raises ValueError."""
    import pyarrow

    first = 0
    try:
        for i in range(table.metadata.num_row_groups):
            at = first
            first += table.metadata.row_group(i).num_rows
            if part.part is None or at == part.part[0]:
                for batch in table.iter_batches(TOGETHER, row_groups=[i], columns=list(columns)):
                    for row in batch.to_pylist():
                        yield at, row
                        at += 1
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(first_line(error)) from None


def first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
