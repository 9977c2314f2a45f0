"""Parquet files, one row group at a time. The only module that uses pyarrow, which is optional."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from d2v_ds.errors import UserError
from shards.family import Input

EXTENSION = ".parquet"
BATCH = 64  # rows that are decoded at a time
BUFFER = 1 << 20  # bytes of a column that are read at a time


def open_table(path: Path) -> Any:
    """A pyarrow ParquetFile. Raises ValueError if the file is not Parquet, UserError if pyarrow is
    not installed."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path}: Parquet needs pyarrow; run `pip install pyarrow`") from None
    try:
        # Without these two options, all of a row group is read at once.
        return pyarrow.parquet.ParquetFile(path, buffer_size=BUFFER, pre_buffer=False)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"is not a Parquet file ({first_line(error)})") from None


def row_groups(root: Path, file: str) -> Iterator[tuple[Input, int]]:
    """Each row group as an input, with its size in bytes. A damaged file is one input; the
    conversion reports the reason."""
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
    """(row number in the file, row) of an input from `row_groups`. Raises ValueError."""
    import pyarrow

    first = 0
    try:
        for i in range(table.metadata.num_row_groups):
            at = first
            first += table.metadata.row_group(i).num_rows
            if part.part is None or at == part.part[0]:
                for batch in table.iter_batches(BATCH, row_groups=[i], columns=list(columns)):
                    for row in batch.to_pylist():
                        yield at, row
                        at += 1
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(first_line(error)) from None


def binary_columns(table: Any) -> list[str]:
    """Names of the columns that hold bytes, also inside of structs and lists."""
    schema = table.schema_arrow
    return [name for name in schema.names if "binary" in str(schema.field(name).type)]


def first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
