"""The files of a shard set: index.json and .idx."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from d2v_ds.data.shard_format import INDEX_FILE, ShardEntry, ShardSet, open_set, set_json
from d2v_ds.data.shard_index import index_bytes, read_index
from d2v_ds.errors import UserError
from tests.fuzz.harness import Target
from tests.fuzz.mutations import first_line, json_values


def _indexes(folder: Path) -> Sequence[bytes]:
    keys = ["a", "b/c", "déjà"]
    numbers = [array("q", range(512, 518)), array("I", range(6)), array("I", range(6))]
    return [index_bytes(("flac", "json"), 10_240, keys, *numbers, array("I", (1, 2, 3)))]


def _read_index(data: bytes, folder: Path) -> Any:
    path = folder / "x.idx"
    path.write_bytes(data)
    found = read_index(path)
    keys = [found.key(i) for i in range(found.count)]
    return found.fields, keys, found.offsets.tolist(), found.sizes.tolist(), found.lengths.tolist()


def _sets(folder: Path) -> Sequence[bytes]:
    entries = tuple(ShardEntry(f"s-{i}", 3, 10_240, 6, "0" * 64) for i in range(2))
    shards = ShardSet(folder, "speech", "frames", 16_000, ("flac", "json"), entries)
    return [set_json(shards, left_out={"damaged": 1}).encode()]


def _open_set(data: bytes, folder: Path) -> Any:
    (folder / INDEX_FILE).write_bytes(data)
    found = open_set(folder, check_tars=False)
    return found, found.samples, found.length, [found.tar(s) for s in found.shards]


TARGETS = [
    Target("idx", _indexes, _read_index, first_line(json_values), (UserError,), protected=True),
    Target("index.json", _sets, _open_set, json_values, (UserError,), protected=False),
]
