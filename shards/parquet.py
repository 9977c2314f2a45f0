"""Parquet files, one row group at a time. The only module that uses pyarrow, which is optional."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from d2v_ds.data.checks import Unusable
from d2v_ds.errors import UserError
from shards.family import Input

EXTENSION = ".parquet"
BATCH = 64  # most rows that are decoded at a time
BATCH_BYTES = 32_000_000  # approximate size of these rows
BUFFER = 1 << 20  # bytes that are read at a time, instead of a whole row group


def open_table(path: Path) -> Any:
    """A pyarrow ParquetFile. Raises Unusable if the file cannot be read or is not Parquet,
    UserError if pyarrow is not installed."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path}: Parquet needs pyarrow; run `pip install pyarrow`") from None
    try:
        path.open("rb").close()
    except OSError as error:
        raise Unusable("unreadable", error.strerror or str(error)) from None
    try:
        # Without these two options, all of a row group is read at once.
        table = pyarrow.parquet.ParquetFile(path, buffer_size=BUFFER, pre_buffer=False)
    except (pyarrow.ArrowException, OSError) as error:
        raise Unusable("damaged", f"is not a Parquet file ({first_line(error)})") from None
    meta = table.metadata
    groups = [meta.row_group(i) for i in range(meta.num_row_groups)]
    if any(min(group.num_rows, group.total_byte_size) < 0 for group in groups):
        raise Unusable("damaged", "is not a Parquet file: it states a negative number of rows")
    if (rows := sum(group.num_rows for group in groups)) != meta.num_rows:
        reason = f"states {meta.num_rows} rows, but its row groups have {rows}"
        raise Unusable("damaged", reason)
    return table


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
    """(row number in the file, row) of an input from `row_groups`. Raises Unusable."""
    import pyarrow

    if part.part and part.part[0] == part.part[1]:
        raise Unusable("empty", "is a row group without rows")
    first = 0
    try:
        for i in range(table.metadata.num_row_groups):
            at, group = first, table.metadata.row_group(i)
            first += group.num_rows
            if part.part is None or at == part.part[0]:
                average = group.total_byte_size // max(1, group.num_rows)
                batch_rows = min(BATCH, max(1, BATCH_BYTES // max(1, average)))
                for batch in table.iter_batches(batch_rows, row_groups=[i], columns=list(columns)):
                    for row in batch.to_pylist():
                        yield at, row
                        at += 1
                if at != first:
                    reason = f"holds {at - first + group.num_rows} of {group.num_rows} rows"
                    raise Unusable("truncated", f"its row group {i} {reason}")
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise Unusable("damaged", first_line(error)) from None


def class_names(table: Any) -> dict[str, tuple[str, ...]]:
    """{column: names of its classes} that the datasets library stores in the schema of a file, in
    the order of their numbers."""
    raw = (table.schema_arrow.metadata or {}).get(b"huggingface", b"")
    try:
        features = json.loads(raw)["info"]["features"]
        return {
            column: tuple(map(str, feature["names"]))
            for column, feature in features.items()
            if isinstance(feature, dict) and isinstance(feature.get("names"), list)
        }
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


def may_hold_files(kind: Any) -> bool:
    """Whether cells of this type may be files: bytes, a path, or a struct of both."""
    import pyarrow.types

    if pyarrow.types.is_struct(kind):
        return {"bytes", "path"} & {field.name for field in kind} != set()
    tests = ("is_binary", "is_large_binary", "is_binary_view", "is_string", "is_large_string")
    return any(getattr(pyarrow.types, test)(kind) for test in tests)


def binary_columns(table: Any) -> list[str]:
    """Names of the columns that hold bytes, also inside of structs and lists."""
    schema = table.schema_arrow
    return [name for name in schema.names if "binary" in str(schema.field(name).type)]


def first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
