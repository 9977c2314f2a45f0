"""Short recordings -> long samples: those that agree in a column are joined end to end.

A crop for pre-training needs more than a word or a digit lasts.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from d2v_ds.data import audio
from d2v_ds.errors import UserError, suggestion
from shards.family import Sample
from shards.keys import make_key
from shards.plan import place
from shards.speech.converter import read_bytes


def join(
    samples: list[Sample], *, root: Path, column: str, seconds: float, seed: int
) -> list[Sample]:
    """Per value of the column, as many samples of even length as come nearest to `seconds`; the
    other columns are dropped."""
    groups: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        if column not in sample.columns:
            raise UserError(
                f"--join {column}: {sample.inputs[0]} has no such column"
                f"{suggestion(column, sample.columns)}"
            )
        groups[str(sample.columns[column])].append(sample)
    joined = []
    for value, members in sorted(groups.items()):
        order = sorted(members, key=lambda sample: (place(sample.key, seed), sample.key))
        durations = [_seconds(root, sample) for sample in order]
        total = sum(durations)
        parts: list[list[Sample]] = [[] for _ in range(max(1, round(total / seconds)))]
        passed = 0.0
        for sample, duration in zip(order, durations, strict=True):
            middle = (passed + duration / 2) / total if total else 0.0
            parts[min(int(middle * len(parts)), len(parts) - 1)].append(sample)
            passed += duration
        for i, part in enumerate(part for part in parts if part):
            joined.append(
                Sample(
                    make_key(f"{value}-{i:06d}"),
                    tuple(item for sample in part for item in sample.inputs),
                    {column: value},
                    sum(sample.size for sample in part),
                )
            )
    return joined


def _seconds(root: Path, sample: Sample) -> float:
    (item,) = sample.inputs
    if item.part:
        return item.part[1] - item.part[0]
    try:
        path = root / item.path
        info = audio.info(read_bytes(path, item.bytes) if item.bytes else path)
    except (ValueError, OSError):  # converting it will say why
        return 0.0
    return info.frames / info.rate
