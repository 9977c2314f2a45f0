"""One row of a manifest -> a sample: the file, the part of it, and the channel that the row names.

The path is in `path` or `audio_filepath`, otherwise in `audio` or `file_name`, relative to the
manifest. `offset` and `duration`, or `start` and `end`, select a part, in seconds; `duration` alone
states the duration of the file. `channel` (NeMo: `channel_selector`) is a number from 0, `left` or
`right`. Numbers may be text. All keys but the path and the times become columns.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from d2v_ds.data.checks import Unusable
from shards.family import Input, Sample
from shards.findings import UNUSABLE
from shards.keys import make_key
from shards.walking import check_file, size_of

PATHS = ("path", "audio_filepath")
OTHER_PATHS = ("audio", "file_name")  # of manifests without one of PATHS
TIMES = ("offset", "duration", "start", "end")
CHANNELS = ("channel", "channel_selector")
NOT_PLAIN = frozenset((*TIMES, *CHANNELS))
SIDES = {"left": 0, "right": 1}
LONGEST = 1e9  # seconds
REMEMBERED = 4096  # files whose duration is remembered
BYTES_PER_SECOND = 32_000  # of a recording whose duration is unknown


class Spelling:
    """Finds different spellings of a path in one folder, such as ./a.wav and /data/a.wav."""

    def __init__(self, root: Path) -> None:
        self._root = os.path.abspath(root)
        self._folders = tuple({os.path.join(self._root, ""), os.path.join(root.resolve(), "")})

    def usual(self, path: str) -> str:
        """The normalised path: relative if the file is in the folder, otherwise absolute."""
        if path[:1] != "/" and "./" not in path and "//" not in path:
            return path  # most paths, in less time
        path = os.path.normpath(os.path.join(self._root, path))
        for folder in self._folders:
            path = path.removeprefix(folder)
        return path


class Rows:
    """The rows of one manifest. Remembers what was listed and the durations of the last files."""

    def __init__(self, root: Path) -> None:
        self._root = os.fspath(root)
        self._spelling = Spelling(root)
        self._durations: OrderedDict[str, tuple[int, float]] = OrderedDict()
        self._listed: set[int] = set()  # hashes instead of inputs, to save memory

    def sample(self, row: dict[str, Any]) -> Sample:
        """The sample that a row describes. Raises Unusable if there is none, and if an earlier row
        lists the same input."""
        path = _path(row)
        if NOT_PLAIN.isdisjoint(row):  # most rows, in less time
            return self._whole(path, row)
        part = channel = seconds = None
        if not row.keys().isdisjoint(TIMES):
            times = {name: _seconds(row.pop(name, None)) for name in TIMES}
            part = self._part(path, times)
            seconds = None if part else times["duration"]
        if not row.keys().isdisjoint(CHANNELS):
            channel = _channel(row)
        item = Input(path, None, part, channel, seconds)
        if part is None and channel is None:
            return self._whole(path, row, item)
        self._check_new(hash((self._spelling.usual(path), *item[1:4])), item)
        stem = os.path.splitext(path)[0]
        if part:
            stem += "-" + "-".join(f"{round(seconds * 1000):08d}" for seconds in part)
        if channel is not None:
            stem += f"-{channel}"
        size = self._size(path, part) if part else self._bytes(path)
        return Sample(make_key(stem), (item,), row, size)

    def _whole(self, path: str, row: dict[str, Any], item: Input | None = None) -> Sample:
        item = item or Input(path)
        self._check_new(hash(self._spelling.usual(path)), item)
        return Sample(make_key(os.path.splitext(path)[0]), (item,), row, self._bytes(path))

    def _check_new(self, identity: int, item: Input) -> None:
        if identity in self._listed:
            raise Unusable("duplicate", f"lists {item} again")
        self._listed.add(identity)

    def _bytes(self, path: str) -> int:
        return size_of(os.path.join(self._root, path))

    def _part(self, path: str, times: Mapping[str, float | None]) -> tuple[float, float] | None:
        """(start, end) in seconds; None for the whole file."""
        start = times["start"] if times["offset"] is None else times["offset"]
        end = times["end"]
        if start is None:
            if end is None:
                return None
            start = 0.0
        if end is None and times["duration"] is not None:
            end = start + times["duration"]
        if end is None:  # up to the end of the file
            if not start:
                return None
            end = self._file(path)[1]
            if not end:
                raise Unusable("row", "has a start, but neither a duration nor an end")
        if end <= start:
            raise Unusable("row", f"its part ends at {end:g} s, before it starts at {start:g} s")
        return start, end

    def _size(self, path: str, part: tuple[float, float]) -> int:
        """The share of the file's bytes that a part has."""
        size, duration = self._file(path)
        seconds = part[1] - part[0]
        if not duration:
            return min(size, round(seconds * BYTES_PER_SECOND))
        return round(size * min(1.0, seconds / duration))

    def _file(self, path: str) -> tuple[int, float]:
        """(bytes, duration in seconds); 0 if they cannot be read, since the conversion reports
        the reason."""
        if path in self._durations:
            self._durations.move_to_end(path)
            return self._durations[path]
        from d2v_ds.data import audio  # only for manifests with parts, because it is slow

        duration = 0.0
        try:
            file = Path(self._root, path)
            check_file(file)
            info = audio.info(file)
            duration = info.frames / info.rate
        except UNUSABLE:
            pass
        self._durations[path] = self._bytes(path), duration
        if len(self._durations) > REMEMBERED:
            self._durations.popitem(last=False)
        return self._durations[path]


def _path(row: dict[str, Any]) -> str:
    """Removes it from the row."""
    if "path" in row and "audio_filepath" not in row:
        name = "path"
    elif "audio_filepath" in row and "path" not in row:
        name = "audio_filepath"
    else:
        name = next((name for name in OTHER_PATHS if name in row), "")
    if not name or row.keys() >= set(PATHS):
        raise Unusable("row", f"needs exactly one of {' and '.join(PATHS)}")
    path = row.pop(name)
    if not isinstance(path, str) or not path or "\0" in path:
        raise Unusable("row", f"its {name} is not a path but {path!r:.80}")
    return path


def _seconds(value: Any) -> float | None:
    """None if there is no value."""
    if type(value) is float and 0 <= value < LONGEST:
        return value
    if value is None or value == "" or value != value:  # NaN: a gap in a table of pandas
        return None
    try:
        seconds = float(value) if isinstance(value, int | float | str) else -1.0
    except (ValueError, OverflowError):
        seconds = -1.0
    if not 0 <= seconds < LONGEST or isinstance(value, bool):
        raise Unusable("row", f"{', '.join(TIMES)} must be in seconds, 0 or more; found {value!r}")
    return seconds


def _channel(row: Mapping[str, Any]) -> int | None:
    """None for all channels. Other text, such as the name of a radio station, is a column."""
    for name in CHANNELS:
        value = row.get(name)
        if isinstance(value, str):
            value = SIDES.get(value.lower(), int(value) if value.isdecimal() else None)
        if value is None:
            continue
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if type(value) is not int or not 0 <= value < 64:
            raise Unusable("row", f"its {name} is {value!r}, not a channel from 0 to 63")
        return value
    return None
