"""Joins short recordings end to end, because a crop for pre-training is longer than a word.

The recordings of a sample agree in one column, for example the speaker.
"""

from __future__ import annotations

from collections import defaultdict

from d2v_ds.data import audio
from d2v_ds.errors import UserError, suggestion
from shards.family import Sample
from shards.findings import UNUSABLE
from shards.keys import make_key
from shards.plan import sort_key
from shards.speech.layout import SpeechLayout


def join(
    samples: list[Sample], *, layout: SpeechLayout, column: str, seconds: float, seed: int
) -> list[Sample]:
    """Joins the samples with equal values in the column to samples of equal duration, as close to
    `seconds` as possible. Other columns are dropped. Raises UserError if a sample lacks the
    column."""
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
        order = sorted(members, key=lambda sample: (sort_key(sample.key, seed), sample.key))
        durations = [_seconds(layout, sample) for sample in order]
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


def _seconds(layout: SpeechLayout, sample: Sample) -> float:
    """0 for an unreadable recording, because the conversion reports the reason."""
    first = sample.inputs[0]
    if first.part and isinstance(first.part[0], float):
        return first.part[1] - first.part[0]
    path = layout.file_of(first)
    seconds = 0.0
    try:
        if path and first.bytes is None:  # reads only the header
            return _duration(audio.info(path))
        for item in layout.read(sample, []):
            seconds += _duration(audio.info(item.content))
    except UNUSABLE:
        pass
    return seconds


def _duration(info: audio.Info) -> float:
    return info.frames / info.rate
