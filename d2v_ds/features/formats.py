"""The files of `d2v-ds features`: one target for each format. Rows are appended to a temporary
file, and `finish` publishes it atomically.

n samples of a shard, T tokens of a sample, D width.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import numpy.typing as npt

from d2v_ds.errors import UserError
from d2v_ds.files import temporary, write_atomically

Rows = list[npt.NDArray[np.float32]]  # features of some samples: [D] or [T, D] each


class Target(Protocol):
    """The output of one shard: rows are appended; `finish` publishes them."""

    def add(self, keys: list[str], rows: Rows, metas: list[dict[str, Any]]) -> None: ...

    def finish(self) -> None: ...

    def __enter__(self) -> Target: ...

    def __exit__(self, *exception: object) -> None: ...


class NpyTarget:
    """NAME.npy, [n, D], or [sum of T, D] with NAME.lengths.npy [n]; NAME.keys.txt, one a line."""

    def __init__(self, path: Path, pool: str) -> None:
        self.path, self.pool = path, pool
        self.aside = temporary(path)
        self.file: IO[bytes] = self.aside.open("wb")
        self.keys: list[str] = []
        self.lengths: list[int] = []
        self.count = self.width = 0

    def __enter__(self) -> NpyTarget:
        return self

    def __exit__(self, *exception: object) -> None:
        self.file.close()
        self.aside.unlink(missing_ok=True)

    def add(self, keys: list[str], rows: Rows, metas: list[dict[str, Any]]) -> None:
        if not rows:
            return
        if not self.width:
            self.width = rows[0].shape[-1]
            self.write_header()
        self.keys += keys
        for row in rows:
            tokens = row.reshape(-1, self.width)
            self.lengths.append(len(tokens))
            self.count += len(tokens)
            self.file.write(np.ascontiguousarray(tokens, "<f4").tobytes())

    def write_header(self) -> None:
        """Has the same size for every count, because numpy leaves room for growth along the first
        axis."""
        facts = {"descr": "<f4", "fortran_order": False, "shape": (self.count, self.width)}
        np.lib.format.write_array_header_1_0(self.file, facts)

    def finish(self) -> None:
        self.file.seek(0)
        self.write_header()
        self.file.flush()
        os.fsync(self.file.fileno())
        text = "".join(f"{key}\n" for key in self.keys)
        write_atomically(self.path.with_suffix(".keys.txt"), text)
        if self.pool == "none":
            with (aside := temporary(self.path.with_suffix(".lengths.npy"))).open("wb") as file:
                np.save(file, np.array(self.lengths, dtype=np.int64))
            os.replace(aside, self.path.with_suffix(".lengths.npy"))
        os.replace(self.aside, self.path)


@dataclass(frozen=True)
class Columns:
    """The columns of the .json of a shard's samples, with the type of each: that of its values if
    they all have the same, else JSON as a string."""

    types: dict[str, type]

    @staticmethod
    def of(metas: Iterable[Mapping[str, Any]]) -> Columns:
        found: dict[str, set[type]] = {}
        for meta in metas:
            for name, value in meta.items():
                if value is not None:
                    found.setdefault(name, set()).add(type(value))
        return Columns({name: common(types) for name, types in sorted(found.items())})

    def values(self, name: str, metas: Sequence[Mapping[str, Any]]) -> list[Any]:
        kind = self.types[name]
        found = [meta.get(name) for meta in metas]
        if kind is object:
            return [None if x is None else json.dumps(x, ensure_ascii=False) for x in found]
        return [None if x is None else kind(x) for x in found]


def common(types: set[type]) -> type:
    """The type of a column whose values have these types; object for a mixture."""
    if types == {int, float}:
        return float
    [first, *others] = types
    return first if not others and first in (str, bool, int, float) else object


class ParquetTarget:
    """NAME.parquet: key, feature (a list of D, or T lists of D), and the columns of the .json. A
    column of the .json that is called key or feature becomes json_key or json_feature."""

    def __init__(self, path: Path, columns: Columns, pool: str) -> None:
        pa = import_pyarrow()
        self.path, self.columns = path, columns
        self.aside = temporary(path)
        vector = pa.list_(pa.float32())
        kinds = {str: pa.string(), bool: pa.bool_(), int: pa.int64(), float: pa.float64()}
        more = [
            (f"json_{name}" if name in ("key", "feature") else name, kinds.get(kind, pa.string()))
            for name, kind in columns.types.items()
        ]
        feature = ("feature", vector if pool == "mean" else pa.list_(vector))
        self.schema = pa.schema([("key", pa.string()), feature, *more])
        self.writer = pa.parquet.ParquetWriter(self.aside, self.schema)

    def __enter__(self) -> ParquetTarget:
        return self

    def __exit__(self, *exception: object) -> None:
        self.writer.close()
        self.aside.unlink(missing_ok=True)

    def add(self, keys: list[str], rows: Rows, metas: list[dict[str, Any]]) -> None:
        pa = import_pyarrow()
        features = [row if row.ndim == 1 else list(row) for row in rows]
        more = [self.columns.values(name, metas) for name in self.columns.types]
        arrays = [
            pa.array(values, kind)
            for values, kind in zip([keys, features, *more], self.schema.types, strict=True)
        ]
        self.writer.write_table(pa.Table.from_arrays(arrays, schema=self.schema))

    def finish(self) -> None:
        self.writer.close()
        os.replace(self.aside, self.path)


def import_pyarrow() -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            "--format parquet needs pyarrow; run `pip install 'd2v-ds[parquet]'`, or use npy"
        ) from None
    return pyarrow
