"""Opens the recordings of a shard: each file once for all of its neighbouring segments.

    sample -> items -> OpenRecording(part of a recording, its notes)

Segments and channels of a file follow each other in a plan, by their start. Their items do not hold
the bytes of the file, of which only the parts are read. All other items hold the bytes of a whole
recording, as their layout reads it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from d2v_ds.data import audio
from d2v_ds.data.checks import Finding, Note, Unusable
from shards.family import Item, Sample
from shards.findings import UNUSABLE, of_error
from shards.speech.layout import SpeechLayout
from shards.walking import check_file

RATES = (4_000, 384_000)  # Hz of recordings of speech; telephones have 8,000
ROUNDED = 0.1  # seconds that a segment may end after its file, because manifests round
STATED = 0.5, 0.02  # seconds, and share, by which a stated duration may differ


@dataclass
class OpenRecording:
    """A recording, or a part of one."""

    file: audio.Recording
    data: bytes  # b"": a segment or channel of a file, whose bytes are not read as a whole
    start: int  # first frame of the part, at the rate of the file
    frames: int
    channel: int | None  # None: the mean of all channels
    notes: list[Note]  # about this part; those about the file are in `file`

    @property
    def info(self) -> audio.Info:
        return self.file.info

    @property
    def altered(self) -> bool:
        """Whether its bytes are not what is used of it."""
        return self.file.repaired or self.file.scale != 1

    def pcm(self, first: int, last: int) -> NDArray[Any]:
        """The frames first to last of the part: int16 or float32 [S] in [-1, 1]."""
        pcm = self.file.pcm(self.start + first, last - first, self.channel)
        scale = self.file.scale
        return pcm if scale == 1 else audio.as_float(pcm) / scale

    def note(self, kind: str, reason: str) -> None:
        """Adds a note once per kind."""
        if all(note.kind != kind for note in self.notes):
            self.notes.append(Note(kind, reason))

    def findings(self, name: str) -> tuple[Finding, ...]:
        decoded = {note.kind: note for note in reversed(self.file.decoded)}  # the first of each
        notes = (*self.file.notes, *decoded.values(), *self.notes)
        return tuple(Finding(name, note.reason, note.kind) for note in notes)


class Recordings:
    """The recordings of one shard; keeps the file of the last segment or channel
    open."""

    def __init__(
        self, layout: SpeechLayout, sample_rate: int, channel: int | None, min_seconds: float
    ) -> None:
        self.layout = layout
        self.sample_rate = sample_rate
        self.channel = channel
        self.min_seconds = min_seconds
        self._path: Path | None = None  # of the file that is open
        self._file: audio.Recording | None = None
        self._by_path = False  # whether the last items that were read are parts of it

    def close(self) -> None:
        if self._file:
            self._file.close()
        self._path = self._file = None

    def read(self, sample: Sample, findings: list[Finding]) -> Iterator[Item[bytes]]:
        """As Layout.read, but the content of a segment or channel of a file is b"", and `open`
        reads it."""
        paths = [
            self.layout.file_of(found) if found.of_recording and found.bytes is None else None
            for found in sample.inputs
        ]
        self._by_path = None not in paths
        if not self._by_path:
            yield from self.layout.read(sample, findings)
            return
        for found, path in zip(sample.inputs, paths, strict=True):
            assert path
            try:
                self._hold(path)
            except UNUSABLE as error:
                findings.append(of_error(str(found), error))
                continue
            about = found.part, found.channel, found.seconds
            yield Item(sample.key, str(found), b"", sample.columns, *about)

    def _hold(self, path: Path) -> None:
        if path != self._path:
            self.close()
            check_file(path)
            self._file, self._path = audio.Recording(path, clipping=True), path

    def open(self, item: Item[bytes]) -> OpenRecording:
        """Raises Unusable if the recording cannot be used."""
        file = self._file if self._by_path else None
        file = file or audio.Recording(item.content, clipping=True)
        file.decoded.clear()
        info, notes = file.info, list[Note]()
        low, high = RATES
        if info.rate != self.sample_rate and not low <= info.rate <= high:
            raise Unusable("rate", f"has {info.rate} Hz, but speech has {low} to {high} Hz")
        channel = self.channel if item.channel is None else item.channel
        if channel is not None and not 0 <= channel < info.channels:
            raise Unusable(
                "channel", f"has no channel {channel}: it has {info.channels}, numbered from 0"
            )
        seconds = info.frames / info.rate
        if item.seconds is not None:
            note = _compared(seconds, item.seconds)
            notes += [note] if note else []
        start, frames = _segment(info, item.part)
        if frames < self.min_seconds * info.rate:
            raise Unusable(
                "min-seconds",
                f"is {frames / info.rate:g} s long, below --min-seconds {self.min_seconds:g}",
            )
        return OpenRecording(file, item.content, start, frames, channel, notes)


def _compared(seconds: float, stated: float) -> Note | None:
    """A note if a recording is longer than the manifest states. Raises Unusable if it is shorter:
    then it was cut off."""
    tolerance = max(STATED[0], STATED[1] * stated)
    if stated - seconds > tolerance:
        raise Unusable("length", f"is {seconds:.4g} s long, but the manifest states {stated:.4g} s")
    if seconds - stated > tolerance:
        reason = f"the manifest states {stated:.4g} s; all {seconds:.4g} s are used"
        return Note("duration", reason)
    return None


def _segment(info: audio.Info, part: tuple[float, float] | None) -> tuple[int, int]:
    """(first frame, frames) of a part in seconds; None: of all."""
    if not part:
        return 0, info.frames
    start, stop = (round(seconds * info.rate) for seconds in part)
    seconds = info.frames / info.rate
    if not 0 <= start < min(stop, info.frames):
        raise Unusable("segment", f"is {seconds:g} s long, but its segment is outside of it")
    if stop > info.frames + info.rate * ROUNDED:
        raise Unusable("segment", f"is {seconds:g} s long, but its segment ends later")
    return start, min(stop, info.frames) - start
