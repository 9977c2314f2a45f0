"""One recording, or several joined ones -> the members of a sample.

    items (encoded recordings, or parts of them) -> decode, resample -> KEY.flac, KEY.json

KEY.json holds the columns of the corpus (label, speaker, text ...), the "paths" of the original
recordings and the measured "duration" in seconds. A recording that is too long is divided evenly
into samples KEY@0000, KEY@0001 ...; they have a "start" in seconds but no text, which would not
match a part. What is altered to use a recording is reported in notes.

S raw audio samples.
"""

from __future__ import annotations

import contextlib
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
from shards.family import Converted, Item, Sample
from shards.findings import UNUSABLE, left_out, of_error
from shards.keys import part_key
from shards.speech.layout import SpeechLayout
from shards.speech.recordings import OpenRecording, Recordings

TEXT_COLUMNS = ("text", "letters")  # transcripts of the whole recording
OVERSHOOT = 1e-3  # share of samples beyond full scale that are clipped without a note
Samples = NDArray[np.int16]  # [S]
Members = tuple[bytes | None, ...]


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

    @property
    def knows_inputs(self) -> bool:
        return self.layout.knows_inputs and not self.max_seconds

    def convert(self, samples: Iterable[Sample]) -> Iterator[Converted]:
        """Unusable recordings are left out and reported; a joined sample keeps the others."""
        with contextlib.closing(
            Recordings(self.layout, self.sample_rate, self.channel, self.min_seconds)
        ) as recordings:
            for sample in samples:
                yield from self._converted(sample, recordings)

    def _converted(self, sample: Sample, recordings: Recordings) -> Iterator[Converted]:
        findings: list[Finding] = []
        items = recordings.read(sample, findings)
        if len(sample.inputs) > 1:
            yield self._joined(sample, items, findings, recordings)
            return
        found = 0
        for item in items:
            found += 1
            yield from self._separate(item, recordings)
        found += len(left_out(findings))
        if findings or found > 1:
            yield Converted("", (), 0, tuple(findings), max(0, found - 1))

    def _separate(self, item: Item[bytes], recordings: Recordings) -> list[Converted]:
        try:
            recording = recordings.open(item)
            made = list(self._samples_of(item, recording))
        except UNUSABLE as error:
            return [Converted(item.key, (), 0, (of_error(item.name, error),))]
        return [*made, *self._noted(item, recording)]

    def _noted(self, item: Item[bytes], recording: OpenRecording) -> list[Converted]:
        notes = recording.findings(item.name)
        return [Converted("", (), 0, notes)] if notes else []

    def _joined(
        self,
        sample: Sample,
        items: Iterable[Item[bytes]],
        findings: list[Finding],
        recordings: Recordings,
    ) -> Converted:
        parts: list[Samples] = []
        used: list[str] = []
        for item in items:
            try:
                recording = recordings.open(item)
                parts.append(self._decode(recording, 0, self._length(recording)))
            except UNUSABLE as error:
                findings.append(of_error(item.name, error))
            else:
                used.append(item.name)
                findings.extend(recording.findings(item.name))
        if not parts:
            return Converted(sample.key, (), 0, tuple(findings))
        x = np.concatenate(parts)
        flac = audio.encode_flac(x, self.sample_rate)
        about = self._about(sample.columns, used, len(x))
        return Converted(sample.key, self._members(flac, about), len(x), tuple(findings))

    def _samples_of(self, item: Item[bytes], recording: OpenRecording) -> Iterator[Converted]:
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
        silent: list[Finding] = []
        for i in range(parts):
            start, stop = (length * j // parts for j in (i, i + 1))
            columns["start"] = round(start / self.sample_rate, 4)
            try:
                x = self._decode(recording, start, stop)
            except Unusable as error:
                if error.kind != "silent":
                    raise
                end = round(stop / self.sample_rate, 4)
                name = f"{item.name}, {columns['start']:g} to {end:g}"
                silent.append(of_error(name, error))
                continue
            about = self._about(columns, [item.name], stop - start)
            members = self._members(audio.encode_flac(x, self.sample_rate), about)
            yield Converted(part_key(item.key, i), members, stop - start)
        if len(silent) == parts:
            raise Unusable("silent", "is silent")
        # Each part counts as an input; the plan counts the recording as one.
        yield Converted("", (), 0, tuple(silent), parts - 1)

    def _about(self, columns: Mapping[str, Any], paths: list[str], length: int) -> bytes:
        about = {**columns, "paths": paths, "duration": round(length / self.sample_rate, 4)}
        return json.dumps(about).encode()

    def _members(self, flac: bytes | None, about: bytes, wav: bytes | None = None) -> Members:
        return (flac, about, wav) if self.keep else (flac, about)

    def _encoded(self, recording: OpenRecording, x: Samples, about: bytes) -> Members:
        """Members of a whole recording. Its own bytes are stored if they need no conversion, which
        avoids encoding them again."""
        data, info = recording.data, recording.info
        whole = recording.frames == info.frames and not recording.altered
        fits = whole and (info.channels, info.rate) == (1, self.sample_rate)
        if fits and data and info.format == "FLAC" and (self.keep or info.subtype == "PCM_16"):
            return self._members(data, about)
        if fits and data and self.keep and info.format == "WAV":
            return self._members(None, about, data)
        return self._members(audio.encode_flac(x, self.sample_rate), about)

    # --------------------------------------------------------------------------------- decoding

    def _length(self, recording: OpenRecording) -> int:
        """In frames at the rate of the set."""
        return -(-recording.frames * self.sample_rate // recording.info.rate)

    def _decode(self, recording: OpenRecording, start: int, stop: int) -> Samples:
        """Frames start to stop at the rate of the set, equal to that range of the whole recording:
        the frames around it are decoded too if resampling needs them. Also called when the bytes
        of the file are stored unchanged, because decoding detects damage. Raises Unusable for
        silence too."""
        old, new = recording.info.rate, self.sample_rate
        divisor = math.gcd(old, new)
        old, new = old // divisor, new // divisor
        reach = audio.resampling_reach(old, new)
        # The first step to decode; a step turns `old` frames into `new` ones.
        step = max(0, start // new - -(-reach // old))
        first = step * old
        last = min(recording.frames, -(-stop * old // new) + reach)
        pcm = recording.pcm(first, last)
        if old == new and pcm.dtype == np.int16:
            return _audible(pcm)
        y = audio.resample(audio.as_float(pcm), old, new)
        y = y[start - step * new : stop - step * new]
        return _audible(audio.to_int16(self._in_range(_audible(y), recording)))

    def _in_range(self, y: audio.Waveform, recording: OpenRecording) -> audio.Waveform:
        """y [S], scaled down if it exceeds full scale. Lossy codecs and resampling exceed it by a
        little in loud recordings. A few such samples are clipped, as players do; scaling all of
        them would change sound recordings and fill the notes."""
        peak = max(float(y.max()), -float(y.min()))
        if peak <= 1 or np.count_nonzero(np.abs(y) > 1) <= OVERSHOOT * len(y):
            return y
        reason = f"reaches {peak:.3g} after decoding and resampling; divided by it"
        recording.note("scaled", reason)
        scaled: audio.Waveform = y / np.float32(peak)
        return scaled


def _audible(x: NDArray[Any]) -> NDArray[Any]:
    if audio.is_silent(x):
        raise Unusable("silent", "is silent")
    return x
