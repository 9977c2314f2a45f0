"""JSON lines, an object each: `path` or `audio_filepath` relative to the manifest, and a part of it
by `offset` and `duration` or by `start` and `end`, in seconds; `text` and any other keys go along
(as in https://docs.nvidia.com/nemo-framework/user-guide/latest/nemotoolkit/asr/datasets.html)."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from d2v_ds.errors import UserError
from shards.family import Input, Sample
from shards.keys import make_key
from shards.walking import size_of

PATHS = ("path", "audio_filepath")
TIMES = ("offset", "duration", "start", "end")


def read(source: Path, rejected: list[tuple[str, str]]) -> tuple[Path, Iterator[Sample]]:
    if not source.is_file():
        raise UserError(f"{source}: is no file, which --layout jsonl needs")
    return source.parent, _samples(source, rejected)


def _samples(manifest: Path, rejected: list[tuple[str, str]]) -> Iterator[Sample]:
    number = 0
    with manifest.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                yield _sample(manifest.parent, line)
            except (ValueError, RecursionError) as error:
                rejected.append((f"{manifest.name}, line {number}", str(error)))
    if not number:
        raise UserError(f"{manifest}: is empty")


def _sample(root: Path, line: bytes) -> Sample:
    """Raises ValueError."""
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"is no JSON ({error})") from None
    if not isinstance(row, dict):
        raise ValueError("is no JSON object")
    found = [row.pop(name) for name in PATHS if name in row]
    if len(found) != 1 or not isinstance(found[0], str) or not found[0] or "\0" in found[0]:
        raise ValueError(f"needs one of {' and '.join(PATHS)}, a text")
    path = found[0]
    part = _part(row)
    stem = os.path.splitext(path)[0]
    if part:
        stem += "-" + "-".join(f"{round(seconds * 1000):08d}" for seconds in part)
    size = size_of(root / path)
    columns = {name: value for name, value in row.items() if name not in TIMES}
    return Sample(make_key(stem), (Input(path, None, part),), columns, size)


def _part(row: dict[str, Any]) -> tuple[float, float] | None:
    times = {name: row[name] for name in TIMES if row.get(name) is not None}
    if not all(type(t) in (int, float) and 0 <= t < 1e9 for t in times.values()):
        raise ValueError(f"{', '.join(TIMES)} are seconds, 0 or more")
    start = times.get("offset", times.get("start"))
    if start is None:  # a duration alone is that of the file
        return None
    end = times.get("end", start + times["duration"] if "duration" in times else None)
    if end is None or end <= start:
        raise ValueError("begins at a time and needs a duration or an end after it")
    return start, end
