"""Describes a shard set: counts, hours, a histogram of lengths, how often each label occurs.

set -> indexes and json members -> rows -> text or Markdown (a data card)
"""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d2v_ds.errors import UserError
from d2v_ds.shard_format import INDEX_FILE, ShardIndex, ShardSet, open_set, read_index

BINS = 10
MAX_VALUES = 50  # a column with more distinct values is not listed
OWN = ("paths", "duration")  # of the json members, of every sample


@dataclass(frozen=True)
class Table:
    title: str
    rows: list[tuple[str, str]]


def describe(path: Path) -> list[Table]:
    """Raises UserError when there is no set."""
    shards = open_set(path)
    lengths = array("I")
    columns: dict[str, Counter[str]] = {}
    for shard in shards.shards:
        index = read_index(shards.index(shard))
        lengths.extend(index.lengths)
        for row in _json_members(shards.tar(shard), index):
            for column, value in row.items():
                counts = columns.setdefault(column, Counter())
                if column not in OWN and (len(counts) <= MAX_VALUES or str(value) in counts):
                    counts[str(value)] += 1
    return [
        _summary(shards),
        _histogram(shards, sorted(lengths)),
        *(_values(column, counts) for column, counts in columns.items() if counts),
    ]


def _json_members(tar: Path, index: ShardIndex) -> Iterator[dict[str, Any]]:
    if "json" not in index.fields:
        return
    width, column = len(index.fields), index.fields.index("json")
    with tar.open("rb") as file:
        for i in range(index.count):
            file.seek(index.offsets[i * width + column])
            try:
                yield json.loads(file.read(index.sizes[i * width + column]))
            except ValueError as error:
                raise UserError(
                    f"{tar}: sample {index.key(i)!r}: its json is damaged ({error}); "
                    f"run `d2v-shards verify {tar.parent}`"
                ) from None


def _summary(shards: ShardSet) -> Table:
    about = json.loads((shards.root / INDEX_FILE).read_bytes())
    size = sum(shard.bytes for shard in shards.shards)
    rows = [
        ("modality", shards.modality),
        ("samples", f"{shards.samples:,}"),
        ("shards", f"{len(shards.shards):,}"),
        ("bytes", f"{size:,}"),
        ("inputs", f"{about['inputs']:,}"),
        ("left out", f"{about['quarantined']:,}"),
    ]
    if shards.sample_rate:
        rows.append(("hours", f"{shards.length / shards.sample_rate / 3600:.3f}"))
        rows.append(("sample rate", f"{shards.sample_rate} Hz"))
    else:
        rows.append((shards.unit, f"{shards.length:,}"))
    rows += [(f"--{name}", str(value)) for name, value in about["options"].items()]
    return Table("Shard set", rows)


def _histogram(shards: ShardSet, lengths: list[int]) -> Table:
    """Ten equal bins from the shortest to the longest."""
    scale, unit = (shards.sample_rate, "s") if shards.sample_rate else (1, shards.unit)
    low, high = lengths[0], lengths[-1]
    counts = Counter(min(BINS - 1, (n - low) * BINS // max(1, high - low)) for n in lengths)
    rows = [
        (name, f"{lengths[int(share * (len(lengths) - 1))] / scale:.2f}")
        for name, share in (("shortest", 0.0), ("median", 0.5), ("longest", 1.0))
    ]
    for i in range(BINS if high > low else 1):
        start, stop = (low + (high - low) * j / BINS for j in (i, i + 1))
        bar = "█" * round(40 * counts[i] / max(counts.values()))
        rows.append((f"{start / scale:.2f} to {stop / scale:.2f}", f"{counts[i]:,} {bar}".rstrip()))
    return Table(f"Length in {unit}", rows)


def _values(column: str, counts: Counter[str]) -> Table:
    if len(counts) > MAX_VALUES:
        return Table(column, [("distinct values", f"more than {MAX_VALUES}")])
    return Table(column, [(value, f"{n:,}") for value, n in sorted(counts.items())])


def as_text(tables: list[Table]) -> str:
    blocks = []
    for table in tables:
        width = max(len(name) for name, _ in table.rows)
        blocks.append(
            "\n".join([table.title, *(f"  {name:<{width}}  {value}" for name, value in table.rows)])
        )
    return "\n\n".join(blocks)


def as_markdown(tables: list[Table]) -> str:
    blocks = []
    for table in tables:
        rows = [
            "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in table.rows
        ]
        blocks.append("\n".join([f"## {table.title}", "", "| | |", "|---|---|", *rows]))
    return "\n\n".join(blocks)
