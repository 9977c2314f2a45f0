"""JSON lines: one object per recording, or per part of one.

The path is `path` or `audio_filepath`, relative to the manifest. `offset` and `duration`, or
`start` and `end`, select a part, in seconds. `text` and all other keys become columns (as in https://docs.nvidia.com/nemo-framework/user-guide/latest/nemotoolkit/asr/datasets.html).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from d2v_ds.data.checks import Finding
from d2v_ds.errors import UserError
from shards.family import Input, Sample
from shards.keys import make_key
from shards.speech.layout import SpeechLayout
from shards.walking import extension_of, size_of

EXTENSIONS = (".jsonl", ".ndjson", ".json")
PATHS = ("path", "audio_filepath")
TIMES = ("offset", "duration", "start", "end")


class JsonLines(SpeechLayout):
    name = "jsonl"
    help = "JSON lines with `path` or `audio_filepath`, and optionally a part in seconds"
    takes = "file"

    @classmethod
    def recognises(cls, source: Path) -> bool:
        return source.is_file() and extension_of(source.name) in EXTENSIONS

    def samples(self, findings: list[Finding]) -> Iterator[Sample]:
        number = 0
        with self.source.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    yield _sample(self.root, line)
                except (ValueError, RecursionError) as error:
                    findings.append(
                        Finding(f"{self.source.name}, line {number}", str(error), "row")
                    )
        if not number:
            raise UserError(f"{self.source}: is empty")


def _sample(root: Path, line: bytes) -> Sample:
    """Raises ValueError if the line does not describe a recording."""
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"is not JSON ({error})") from None
    if not isinstance(row, dict):
        raise ValueError("is not a JSON object")
    found = [row.pop(name) for name in PATHS if name in row]
    if len(found) != 1 or not isinstance(found[0], str) or not found[0] or "\0" in found[0]:
        raise ValueError(f"needs exactly one of {' and '.join(PATHS)}, a string")
    path = found[0]
    part = _part(row)
    stem = os.path.splitext(path)[0]
    if part:
        stem += "-" + "-".join(f"{round(seconds * 1000):08d}" for seconds in part)
    size = size_of(root / path)
    columns = {name: value for name, value in row.items() if name not in TIMES}
    return Sample(make_key(stem), (Input(path, None, part),), columns, size)


def _part(row: dict[str, Any]) -> tuple[float, float] | None:
    """(start, end) in seconds, None for the whole file. Raises ValueError."""
    times = {name: row[name] for name in TIMES if row.get(name) is not None}
    if not all(type(t) in (int, float) and 0 <= t < 1e9 for t in times.values()):
        raise ValueError(f"{', '.join(TIMES)} must be in seconds, 0 or more")
    start = times.get("offset", times.get("start"))
    if start is None:  # `duration` without a start is the duration of the file
        return None
    end = times.get("end", start + times["duration"] if "duration" in times else None)
    if end is None or end <= start:
        raise ValueError("has a start, so it needs a duration, or an end after the start")
    return start, end
