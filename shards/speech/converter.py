"""One recording, or several joined ones -> the members of a sample.

    items (encoded recordings, or parts of them) -> decode, resample -> KEY.flac, KEY.json

KEY.json holds the columns of the corpus (label, speaker, text ...), the "paths" of the original
recordings and the measured "duration" in seconds. A recording that is too long is divided evenly
into samples KEY@0000, KEY@0001 ...; they have a "start" in seconds but no text, which would not
match a part.

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
from d2v_ds.data.checks import Finding, Unusable
from d2v_ds.data.ogg import ogg_problem
from shards.family import Converted, Item, Sample
from shards.findings import left_out, of_error
from shards.keys import part_key
from shards.speech.layout import SpeechLayout

TEXT_COLUMNS = ("text", "letters")  # transcripts of the whole recording
Samples = NDArray[np.int16]  # [S]
Members = tuple[bytes | None, ...]


@dataclass(frozen=True)
class EncodedRecording:
    """An encoded recording, or a part of one."""

    data: bytes
    info: audio.Info
    start: int  # first frame of the part, at the rate of the file
    frames: int


@dataclass(frozen=True)
class SpeechConverter:
    layout: SpeechLayout
    sample_rate: int
    channel: int | None = None  # None: the mean of all channels
    max_seconds: float = 0.0  # 0: any duration
    min_seconds: float = 0.0
    keep: bool = False  # store wav and flac of the right rate unchanged

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
        """Unusable recordings are left out and reported; a joined sample keeps the others."""
        for sample in samples:
            findings: list[Finding] = []
            items = self.layout.read(sample, findings)
            if len(sample.inputs) > 1:
                yield self._joined(sample, items, findings)
                continue
            found = 0
            for item in items:
                found += 1
                yield from self._separate(item)
            found += len(left_out(findings))
            if findings or found > 1:
                yield Converted("", (), 0, tuple(findings), max(0, found - 1))

    def _separate(self, item: Item[bytes]) -> list[Converted]:
        try:
            return list(self._samples_of(item, self._open(item)))
        except (ValueError, OSError) as error:
            return [Converted(item.key, (), 0, (of_error(item.name, error),))]

    def _joined(
        self, sample: Sample, items: Iterable[Item[bytes]], findings: list[Finding]
    ) -> Converted:
        parts: list[Samples] = []
        used: list[str] = []
        for item in items:
            try:
                recording = self._open(item)
                parts.append(self._decode(recording, 0, self._length(recording)))
                used.append(item.name)
            except (ValueError, OSError) as error:
                findings.append(of_error(item.name, error))
        if not parts:
            return Converted(sample.key, (), 0, tuple(findings))
        x = np.concatenate(parts)
        flac = audio.encode_flac(x, self.sample_rate)
        about = self._about(sample.columns, used, len(x))
        return Converted(sample.key, self._members(flac, about), len(x), tuple(findings))

    def _samples_of(self, item: Item[bytes], recording: EncodedRecording) -> Iterator[Converted]:
        """One sample, or the parts of a long recording."""
        length = self._length(recording)
        limit = int(self.max_seconds * self.sample_rate) or length
        parts = -(-length // limit)
        if parts == 1:
            x = self._decode(recording, 0, length)
            about = self._about(item.columns, [item.name], length)
            yield Converted(item.key, self._encoded(recording, x, about), length)
            return
        columns = {k: v for k, v in item.columns.items() if k not in TEXT_COLUMNS}
        for i in range(parts):
            start, stop = (length * j // parts for j in (i, i + 1))
            x = self._decode(recording, start, stop)
            columns["start"] = round(start / self.sample_rate, 4)
            about = self._about(columns, [item.name], stop - start)
            members = self._members(audio.encode_flac(x, self.sample_rate), about)
            yield Converted(part_key(item.key, i), members, stop - start)

    def _about(self, columns: Mapping[str, Any], paths: list[str], length: int) -> bytes:
        about = {**columns, "paths": paths, "duration": round(length / self.sample_rate, 4)}
        return json.dumps(about).encode()

    def _members(self, flac: bytes | None, about: bytes, wav: bytes | None = None) -> Members:
        return (flac, about, wav) if self.keep else (flac, about)

    def _encoded(self, recording: EncodedRecording, x: Samples, about: bytes) -> Members:
        """Members of a whole recording. Its own bytes are stored if they need no conversion, which
        avoids encoding them again."""
        data, info = recording.data, recording.info
        whole = recording.frames == info.frames
        fits = whole and (info.channels, info.rate) == (1, self.sample_rate)
        if fits and info.format == "FLAC" and (self.keep or info.subtype == "PCM_16"):
            return self._members(data, about)
        if fits and self.keep and info.format == "WAV":
            return self._members(None, about, data)
        return self._members(audio.encode_flac(x, self.sample_rate), about)

    # ---------------------------------------------------------------------------------- reading

    def _open(self, item: Item[bytes]) -> EncodedRecording:
        """Raises ValueError if the recording cannot be used."""
        data = item.content
        if data[:4] == b"OggS" and (problem := ogg_problem(data)):
            raise ValueError(problem)
        info = audio.info(data)
        if self.channel is not None and self.channel >= info.channels:
            raise ValueError(
                f"has no channel {self.channel}: it has {info.channels}, numbered from 0"
            )
        start, frames = 0, info.frames
        if item.part:
            start, stop = (round(seconds * info.rate) for seconds in item.part)
            if not 0 <= start < min(stop, info.frames):
                raise ValueError(
                    f"is {info.frames / info.rate:g} s long, but its segment is outside of it"
                )
            if stop > info.frames + info.rate // 10:  # manifests round
                raise ValueError(
                    f"is {info.frames / info.rate:g} s long, but its segment ends later"
                )
            frames = min(stop, info.frames) - start
        if frames < self.min_seconds * info.rate:
            seconds = frames / info.rate
            raise Unusable(
                "min-seconds", f"is {seconds:g} s long, below --min-seconds {self.min_seconds:g}"
            )
        return EncodedRecording(data, info, start, frames)

    def _length(self, recording: EncodedRecording) -> int:
        """In frames at the rate of the set."""
        return -(-recording.frames * self.sample_rate // recording.info.rate)

    def _decode(self, recording: EncodedRecording, start: int, stop: int) -> Samples:
        """Frames start to stop at the rate of the set, equal to that range of the whole recording:
        the frames around it are decoded too if resampling needs them. Also called when the bytes
        of the file are stored unchanged, because decoding detects damage."""
        old, new = recording.info.rate, self.sample_rate
        divisor = math.gcd(old, new)
        old, new = old // divisor, new // divisor
        reach = audio.resampling_reach(old, new)
        # The first step to decode; a step turns `old` frames into `new` ones.
        step = max(0, start // new - -(-reach // old))
        first = step * old
        last = min(recording.frames, -(-stop * old // new) + reach)
        x = audio.decode(recording.data, recording.start + first, last - first, self.channel)
        y = audio.to_int16(audio.resample(x, old, new))
        return y[start - step * new : stop - step * new]
