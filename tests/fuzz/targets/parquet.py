"""Parquet files as the conversions of the three families read them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from random import Random
from typing import Any

from d2v_ds.errors import UserError
from tests.fuzz.harness import Target
from tests.fuzz.mutations import any_bytes
from tests.fuzz.targets.corpora import END, MODEL, _convert, _model
from tests.helpers.corpora import put, recording
from tests.shards.pictures import picture

OPTIONS = {
    "speech": (),
    "images": (),
    "text": ("--tokenizer", f"{{}}/{MODEL}", "--block", "16", "--label-key", "label"),
}


def tables(folder: Path) -> Sequence[bytes]:
    """A family, and a table of two or four rows for it, plain and compressed."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    sound = {"bytes": recording(seconds=0.02), "path": "a.wav"}
    image = {"bytes": picture("PNG", size=(5, 4)), "path": "a.png"}
    columns: dict[str, dict[str, list[Any]]] = {
        "speech": {"audio": [sound] * 2, "text": ["a", None], "n": [1, 2]},
        "images": {"image": [image] * 2, "label": [0, 1]},
        "text": {"text": ["hello", "you"] * 2, "label": ["x", "y"] * 2, "t": [[1], [], None, [2]]},
    }
    found = []
    for family, table in columns.items():
        for compression in ("none", "snappy", "zstd"):
            buffer = io.BytesIO()
            pq.write_table(pa.table(table), buffer, compression=compression, row_group_size=2)
            found.append(family.encode() + END + buffer.getvalue())
    return found


def _read(data: bytes, folder: Path) -> Any:
    name, _, content = data.partition(END)
    family = name.decode()
    model = folder / "in" / MODEL
    if not model.exists():
        put(model, _model())
    path = put(folder / "in/t.parquet", content)
    return _convert(family, path, *(one.format(folder / "in") for one in OPTIONS[family]))


def tail(data: bytes, rng: Random) -> bytes:
    """Changes of the footer, which describes all else, or of any bytes."""
    name, end, content = data.partition(END)
    if rng.random() < 0.4:
        return name + end + any_bytes(content, rng)
    size = min(len(content), 1500)
    return name + end + content[:-size] + any_bytes(content[-size:], rng)


TARGETS = (
    [Target("Parquet", tables, _read, tail, (UserError,), protected=False)]
    if find_spec("pyarrow")
    else []
)
