"""Describes a shard set: counts, hours, a histogram of lengths, and label counts.

    set -> indexes and json members -> tables -> text or Markdown (a data card)

Needs no modality class, so it also describes sets of modalities that are not installed.
"""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from d2v_ds.data.checks import OUTCOMES
from d2v_ds.data.shard_format import ShardSet, open_set
from d2v_ds.data.shard_index import ShardIndex, index_of
from d2v_ds.errors import UserError
from shards.findings import QUARANTINE_FILE, masked

BINS = 10
COUNTS = {"inputs": "inputs", "quarantined": "left out"}  # {entry of index.json: title}
MAX_VALUES = 50  # a column with more distinct values is not listed
OWN = ("paths", "path", "duration", "start", "width", "height", "index")  # of the converters


@dataclass(frozen=True)
class Table:
    title: str
    rows: list[tuple[str, str]]


def describe(path: Path) -> list[Table]:
    """Raises UserError if there is no set."""
    shards = open_set(path)
    about = shards.about
    lengths = array("I")
    columns: dict[str, Counter[str]] = {}
    members: Counter[str] = Counter()
    for shard in shards.shards:
        index = index_of(shards, shard)
        lengths.extend(index.lengths)
        offsets = np.frombuffer(index.offsets, np.int64).reshape(index.count, -1)
        for name, number in zip(index.fields, (offsets > 0).sum(axis=0), strict=True):
            members[name] += int(number)
        for row in _rows(shards.tar(shard), index):
            for column, value in row.items():
                counts = columns.setdefault(column, Counter())
                if column not in OWN and (len(counts) <= MAX_VALUES or str(value) in counts):
                    counts[str(value)] += 1
    ordered = np.sort(np.frombuffer(lengths, np.uint32))
    return [
        _summary(shards, about),
        Table("Members", [(name, f"{n:,}") for name, n in sorted(members.items()) if n]),
        _histogram(shards, ordered),
        *(_values(column, counts) for column, counts in columns.items() if counts),
        *_remarks(about, columns),
        *_findings(shards.root, about),
        *_options(about),
    ]


def _rows(tar: Path, index: ShardIndex) -> Iterator[dict[str, Any]]:
    """Columns of each sample: its json member, and its cls member as label."""
    width = len(index.fields)
    wanted = [(name, index.fields.index(name)) for name in ("json", "cls") if name in index.fields]
    if not wanted:
        return
    with tar.open("rb") as file:
        for i in range(index.count):
            row: dict[str, Any] = {}
            for name, column in wanted:
                cell = i * width + column
                if not index.offsets[cell]:
                    continue
                file.seek(index.offsets[cell])
                data = file.read(index.sizes[cell])
                try:
                    row |= json.loads(data) if name == "json" else {"label": data.decode().strip()}
                except (ValueError, TypeError, RecursionError) as error:
                    raise UserError(
                        f"{tar}, sample {index.key(i)!r}: its .{name} is damaged ({error}); "
                        f"run `d2v-shards verify {tar.parent}`"
                    ) from None
            yield row


def _summary(shards: ShardSet, about: dict[str, Any]) -> Table:
    size = sum(shard.bytes for shard in shards.shards)
    rows = [
        ("modality", shards.modality),
        ("samples", f"{shards.samples:,}"),
        ("shards", f"{len(shards.shards):,}"),
        ("bytes", f"{size:,}"),
        *((title, f"{about[name]:,}") for name, title in COUNTS.items() if name in about),
    ]
    if shards.sample_rate:
        rows.append(("hours", f"{shards.length / shards.sample_rate / 3600:.3f}"))
        rows.append(("sample rate", f"{shards.sample_rate} Hz"))
    else:
        rows.append((shards.length_unit, f"{shards.length:,}"))
    return Table("Shard set", rows)


def _options(about: dict[str, Any]) -> Iterator[Table]:
    rows = [(f"--{name}", str(value)) for name, value in about.get("options", {}).items()]
    if rows:
        yield Table("Converted with", rows)


def _histogram(shards: ShardSet, lengths: NDArray[np.uint32]) -> Table:
    """BINS equal bins from the shortest to the longest."""
    scale, unit = (shards.sample_rate, "s") if shards.sample_rate else (1, shards.length_unit)
    low, high = int(lengths[0]), int(lengths[-1])
    bins = (lengths.astype(np.int64) - low) * BINS // max(1, high - low)
    counts = np.bincount(np.minimum(bins, BINS - 1), minlength=BINS)

    def show(length: float) -> str:
        return f"{length / scale:.2f}" if shards.sample_rate else f"{length:,.0f}"

    rows = [
        (name, show(int(lengths[int(share * (len(lengths) - 1))])))
        for name, share in (("shortest", 0.0), ("median", 0.5), ("longest", 1.0))
    ]
    for i in range(BINS if high > low else 1):
        start, stop = (low + (high - low) * j / BINS for j in (i, i + 1))
        bar = "█" * round(40 * counts[i] / counts.max())
        rows.append((f"{show(start)} to {show(stop)}", f"{counts[i]:,} {bar}".rstrip()))
    return Table(f"Length in {unit}", rows)


def _values(column: str, counts: Counter[str]) -> Table:
    if len(counts) > MAX_VALUES:
        return Table(column, [("distinct values", f"more than {MAX_VALUES}")])
    return Table(column, [(value, f"{n:,}") for value, n in sorted(counts.items())])


def _remarks(about: dict[str, Any], columns: Mapping[str, Counter[str]]) -> Iterator[Table]:
    """What a user must know about the corpus."""
    rows = [("", str(remark)) for remark in about.get("remarks", ())]
    labels = columns.get("label", Counter())
    if len(labels) <= MAX_VALUES:
        missing = [str(name) for name in about.get("classes", ()) if str(name) not in labels]
        if missing:
            rows.append(("", f"classes without a sample: {', '.join(missing)}"))
    if rows:
        yield Table("Remarks", rows)


def _findings(root: Path, about: dict[str, Any]) -> Iterator[Table]:
    """What was left out, passed over and altered, by kind, then the reasons of what was left
    out."""
    for entry, title in OUTCOMES.items():
        if about.get(entry):
            yield Table(title.capitalize(), [(kind, f"{n:,}") for kind, n in about[entry].items()])
    if not (root / QUARANTINE_FILE).exists():
        return
    counts: Counter[str] = Counter()
    with (root / QUARANTINE_FILE).open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                reason = masked(json.loads(line)["reason"])
            except (ValueError, KeyError, TypeError, RecursionError):
                reason = f"a damaged line of {QUARANTINE_FILE}"
            counts[reason] += 1
    if counts:
        yield Table("Reasons", [(reason, f"{n:,}") for reason, n in counts.most_common(MAX_VALUES)])


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
