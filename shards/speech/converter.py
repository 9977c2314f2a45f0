"""One recording, or several joined, -> the members of a sample.

    Sample (which files, which stretch of each) -> read, decode, resample -> KEY.flac, KEY.json

KEY.json holds the corpus' columns (label, speaker, text ...), "paths" of the original recordings
and "duration" in seconds, as measured. A recording that is too long is divided evenly into samples
KEY@0000, KEY@0001 ..., which have a "start" in seconds instead of a text that fits no part.

S raw audio samples.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from d2v_ds.data import audio
from d2v_ds.data.ogg import ogg_problem
from shards.family import Converted, Input, Rejected, Sample
from shards.keys import part_key

TEXT_COLUMNS = ("text", "letters")  # say what is spoken from beginning to end
Samples = NDArray[np.int16]  # [S]
Members = tuple[bytes | None, ...]


class TooShort(ValueError):
    """Left out because that was asked for."""


@dataclass(frozen=True)
class Recording:
    """What an input holds, before it is decoded."""

    data: bytes
    info: audio.Info
    start: int  # first frame of the part that is meant, at the file's rate
    frames: int


@dataclass(frozen=True)
class SpeechConverter:
    root: Path  # of the paths in the plan
    sample_rate: int
    channel: int | None = None  # None: their mean
    max_seconds: float = 0.0  # 0: any length
    min_seconds: float = 0.0
    keep: bool = False  # whether wav and flac of the right rate go through

    modality = "speech"
    length_unit = "frames"

    @property
    def fields(self) -> tuple[str, ...]:
        return ("flac", "json", "wav") if self.keep else ("flac", "json")

    @property
    def about(self) -> dict[str, Any]:
        return {}

    @property
    def files(self) -> dict[str, Path]:
        return {}

    def convert(self, samples: Iterable[Sample]) -> Iterator[Converted]:
        """Recordings that cannot be used are left out of their sample and named."""
        for sample in samples:
            if len(sample.inputs) == 1:
                yield from self._convert_one(sample)
            else:
                yield self._convert_joined(sample)

    def _convert_one(self, sample: Sample) -> Iterator[Converted]:
        (item,) = sample.inputs
        try:
            made = list(self._samples_of(sample, self._open(item)))
        except TooShort as error:
            made = [Converted(sample.key, (), 0, unwanted=((str(item), str(error)),))]
        except (ValueError, OSError) as error:
            made = [Converted(sample.key, (), 0, ((str(item), _reason(error)),))]
        yield from made

    def _convert_joined(self, sample: Sample) -> Converted:
        parts: list[Samples] = []
        used: list[str] = []
        rejected: list[Rejected] = []
        unwanted: list[Rejected] = []
        for item in sample.inputs:
            try:
                recording = self._open(item)
                parts.append(self._decode(recording, 0, self._length(recording)))
                used.append(str(item))
            except TooShort as error:
                unwanted.append((str(item), str(error)))
            except (ValueError, OSError) as error:
                rejected.append((str(item), _reason(error)))
        left_out = tuple(rejected), tuple(unwanted)
        if not parts:
            return Converted(sample.key, (), 0, *left_out)
        x = np.concatenate(parts)
        flac = audio.encode_flac(x, self.sample_rate)
        about = self._about(sample.columns, used, len(x))
        return Converted(sample.key, self._members(flac, about), len(x), *left_out)

    def _samples_of(self, sample: Sample, recording: Recording) -> Iterator[Converted]:
        """Of one recording: one sample, or the parts of a long one."""
        length = self._length(recording)
        paths = [str(item) for item in sample.inputs]
        limit = int(self.max_seconds * self.sample_rate) or length
        parts = -(-length // limit)
        if parts == 1:
            x = self._decode(recording, 0, length)
            about = self._about(sample.columns, paths, length)
            yield Converted(sample.key, self._encoded(recording, x, about), length)
            return
        columns = {k: v for k, v in sample.columns.items() if k not in TEXT_COLUMNS}
        for i in range(parts):
            start, stop = (length * j // parts for j in (i, i + 1))
            x = self._decode(recording, start, stop)
            columns["start"] = round(start / self.sample_rate, 4)
            about = self._about(columns, paths, stop - start)
            members = self._members(audio.encode_flac(x, self.sample_rate), about)
            yield Converted(part_key(sample.key, i), members, stop - start)

    def _about(self, columns: Mapping[str, Any], paths: list[str], length: int) -> bytes:
        about = {**columns, "paths": paths, "duration": round(length / self.sample_rate, 4)}
        return json.dumps(about).encode()

    def _members(self, flac: bytes | None, about: bytes, wav: bytes | None = None) -> Members:
        return (flac, about, wav) if self.keep else (flac, about)

    def _encoded(self, recording: Recording, x: Samples, about: bytes) -> Members:
        """Members of a whole recording; its own bytes where they hold just that, so that nothing is
        encoded again."""
        data, info = recording.data, recording.info
        whole = recording.frames == info.frames
        fits = whole and (info.channels, info.rate) == (1, self.sample_rate)
        if fits and info.format == "FLAC" and (self.keep or info.subtype == "PCM_16"):
            return self._members(data, about)
        if fits and self.keep and info.format == "WAV":
            return self._members(None, about, data)
        return self._members(audio.encode_flac(x, self.sample_rate), about)

    # ---------------------------------------------------------------------------------- reading

    def _open(self, item: Input) -> Recording:
        """Raises ValueError, OSError."""
        data = read_bytes(self.root / item.path, item.bytes)
        if data[:4] == b"OggS" and (problem := ogg_problem(data)):
            raise ValueError(problem)
        info = audio.info(data)
        if self.channel is not None and self.channel >= info.channels:
            raise ValueError(f"has no channel {self.channel}, only {info.channels}, from 0 on")
        start, frames = 0, info.frames
        if item.part:
            start, stop = (round(seconds * info.rate) for seconds in item.part)
            if not 0 <= start < min(stop, info.frames):
                raise ValueError(f"is {info.frames / info.rate:g} s long: has no such part")
            if stop > info.frames + info.rate // 10:  # manifests round
                raise ValueError(f"is {info.frames / info.rate:g} s long: its part ends later")
            frames = min(stop, info.frames) - start
        if frames < self.min_seconds * info.rate:
            raise TooShort(f"is {frames / info.rate:g} s long, --min-seconds {self.min_seconds:g}")
        return Recording(data, info, start, frames)

    def _length(self, recording: Recording) -> int:
        """At the set's rate."""
        return -(-recording.frames * self.sample_rate // recording.info.rate)

    def _decode(self, recording: Recording, start: int, stop: int) -> Samples:
        """Frames start to stop at the set's rate, what they would be of the whole recording: those
        around them are read too where resampling needs them. Decoded even if the file's own bytes
        are taken: only that shows damage."""
        old, new = recording.info.rate, self.sample_rate
        divisor = math.gcd(old, new)
        old, new = old // divisor, new // divisor
        reach = audio.resampling_reach(old, new)
        # The step, in which `old` frames become `new`, that has the first frame needed.
        step = max(0, start // new - -(-reach // old))
        first = step * old
        last = min(recording.frames, -(-stop * old // new) + reach)
        x = audio.decode(recording.data, recording.start + first, last - first, self.channel)
        y = audio.to_int16(audio.resample(x, old, new))
        return y[start - step * new : stop - step * new]


def read_bytes(path: Path, stretch: tuple[int, int] | None) -> bytes:
    """A file, or so many bytes of it. Raises OSError, and ValueError if it ends early."""
    if not stretch:
        return path.read_bytes()
    first, number = stretch
    with path.open("rb") as file:
        file.seek(first)
        data = file.read(number)
    if len(data) != number:
        raise ValueError(f"ends {number - len(data)} bytes early")
    return data


def _reason(error: ValueError | OSError) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
