"""Opens audio files with libsndfile, and finds out how long they really are.

    bytes or a path -> open_streams -> Stream, one for each of several joined files -> samples

libsndfile silently reads what is left of a truncated file, and the first of several joined files.
Containers of uncompressed audio are compared with their headers (containers.py); MP3, FLAC and Ogg
are searched for frames that libsndfile would not decode (mpeg.py, flac.py, ogg.py).
"""

from __future__ import annotations

import contextlib
import io
import mmap
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from numpy.typing import NDArray

from d2v_ds.data import flac, foreign, mpeg, ogg, tags
from d2v_ds.data.checks import Note, Unusable
from d2v_ds.data.containers import Buffer, Extent, extent_of

EXACT = ("PCM_16", "PCM_S8", "PCM_U8")  # read as int16 without a loss
WIDTHS = {  # bytes of a sample
    **dict.fromkeys(("PCM_S8", "PCM_U8", "ULAW", "ALAW"), 1),
    **{"PCM_16": 2, "PCM_24": 3, "PCM_32": 4, "FLOAT": 4, "DOUBLE": 8},
}
COMPRESSED = ("MP3", "OGG")  # whose seeking is not exact
GSM_BLOCK = 65, 320  # bytes and frames of a block of a WAV
LARGEST_ARRAY = 64  # channels of a recording
# Formats in which libsndfile takes bytes behind compressed samples, even padding, for samples.
BEHIND = ("WAV", "WAVEX", "W64", "AU")
UNKNOWN_FRAMES = 1 << 48  # libsndfile reports 2^63 - 1 for a FLAC without a length
UNEXPLAINED = 0.1  # seconds of bytes behind the samples that may be anything
UNCHECKED = {  # what libsndfile reads, but no recording, and without a length to compare
    "MAT4": "a MATLAB file",
    "MAT5": "a MATLAB file",
    "XI": "an instrument of FastTracker",
}
BLOCK = 1 << 20  # frames that are decoded at a time
AT_ONCE = 1 << 31  # samples of all channels; libsndfile decodes fewer if more are asked for
PER_BYTE = 16  # samples that most files hold; of others, memory is taken as they are decoded
STEP = 1024  # frames that are decoded at a time to find out where a file ends
LOST = "lost sync"  # what libsndfile says where the frames of a FLAC end


class _File(soundfile.SoundFile):  # type: ignore[misc]  # soundfile has no types
    """soundfile seeks after each read of a seekable file, which disturbs the decoders of lossy
    formats. This class does not."""

    def seekable(self) -> bool:
        return False

    @property
    def is_exact(self) -> bool:
        """Whether `seek` finds the exact frame."""
        return self.format not in COMPRESSED and super().seekable()


class _Bytes(io.BytesIO):
    """For libsndfile, which seeks before the first byte of damaged files. An exception in its
    callback would be printed."""

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        try:
            return super().seek(offset, whence)
        except ValueError:
            return -1


@dataclass
class Stream:
    """An open file of one stream."""

    file: _File
    source: bytes | Path
    frames: int
    kept: list[NDArray[Any]] = field(default_factory=list, repr=False)  # the last, of `_forward`
    kept_from: int = 0  # the first frame in `kept`
    at: int = 0  # the frame that `_forward` decodes next

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """The frames start to stop, [frames, channels]: int16 if the file has at most 16 bits,
        otherwise float32. Raises Unusable."""
        try:
            if not self.file.is_exact:
                data = self._forward(start, stop)
            else:
                if self.file.tell() != start:
                    self.file.seek(start)
                data = self._next(stop - start)
        except soundfile.SoundFileError as error:
            reason = _reason(error)
            if self.file.format == "FLAC" and LOST in reason and _is_cut(self.source):
                raise Unusable("truncated", "is truncated: its last frame is incomplete") from None
            raise Unusable("damaged", f"cannot be decoded: {reason}") from None
        if len(data) != stop - start:
            missing = stop - start - len(data)
            raise Unusable("truncated", f"ends {missing} frames before the length in its header")
        return data

    def _next(self, frames: int) -> NDArray[Any]:
        # Reading int16 is several times faster than float32, which libsndfile needs for wider
        # samples and for float files, whose values it does not scale to integers.
        if frames * self.file.channels >= AT_ONCE:
            hours = frames / self.file.samplerate / 3600
            raise Unusable(
                "size", f"{hours:.3g} hours cannot be decoded at once; divide it with --max-seconds"
            )
        # A header may state any length, and numpy would allocate it.
        most = max(BLOCK, PER_BYTE * _size_of(self.source) // self.file.channels)
        pieces = []
        for start in range(0, frames or 1, most):
            size = min(most, frames - start)
            pieces.append(self._decoded(size))
            if len(pieces[-1]) < size:
                break
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def _decoded(self, frames: int) -> NDArray[Any]:
        wide = self.file.subtype == "DOUBLE"
        kind = "int16" if self.file.subtype in EXACT else "float64" if wide else "float32"
        data: NDArray[Any] = self.file.read(frames, dtype=kind, always_2d=True)
        return _narrowed(data) if wide else data

    def _forward(self, start: int, stop: int) -> NDArray[Any]:
        """Decodes on from the last part, which is kept, so that parts in order of their start
        decode the file once."""
        if start < self.kept_from:
            self.file.close()
            self.file, self.kept, self.kept_from, self.at = _open(self.source), [], 0, 0
        while self.at < stop:
            # All at once if it is the whole, because joining blocks takes as long as reading them.
            whole = start == self.at and stop == self.frames
            piece = self._next(stop - start if whole else min(BLOCK, stop - self.at))
            if not len(piece):
                break
            self.at += len(piece)
            self.kept.append(piece)
            self._forget(start)
        self._forget(start)
        if len(self.kept) > 1:
            self.kept = [np.concatenate(self.kept)]
        return self.kept[0][: stop - start] if self.kept else self._next(0)

    def _forget(self, start: int) -> None:
        """Drops decoded frames before `start`."""
        while self.kept and self.kept_from + len(self.kept[0]) <= start:
            self.kept_from += len(self.kept.pop(0))
        if self.kept and self.kept_from < start:
            self.kept[0] = self.kept[0][start - self.kept_from :]
            self.kept_from = start


def _size_of(source: bytes | Path) -> int:
    return len(source) if isinstance(source, bytes) else os.stat(source).st_size


def _is_cut(source: bytes | Path) -> bool:
    """Whether a FLAC that cannot be decoded as a whole can be decoded up to its last frame."""
    with _buffer(source) as data:
        there, largest = flac.last_frame(data, 0, len(data)), flac.largest_frame(data)
    file, decoded = _open(source), 0
    with file, contextlib.suppress(soundfile.SoundFileError):
        while read := len(file.read(STEP, dtype="int16")):
            decoded += read
    return 0 < there <= decoded + STEP + largest


def _narrowed(data: NDArray[np.float64]) -> NDArray[np.float32]:
    """Raises Unusable for finite values that float32 cannot hold; it keeps others as they are."""
    largest = np.finfo(np.float32).max
    if (too_large := np.isfinite(data) & (np.abs(data) > largest)).any():
        peak = float(np.abs(data[too_large]).max())
        raise out_of_range(peak)
    return data.astype(np.float32)


def out_of_range(peak: float) -> Unusable:
    reason = f"has float samples up to {peak:.6g}, which fits no full scale"
    return Unusable("range", f"{reason}; store it with samples from -1 to 1")


@dataclass
class Opened:
    """An audio file."""

    streams: list[Stream]
    notes: list[Note]
    repaired: bool  # whether another reader would decode something else


def open_streams(source: bytes | Path, trusted: bool) -> Opened:
    """trusted: without looking for audio that libsndfile would not decode, because it was done when
    the set was made. Raises Unusable; a missing file raises FileNotFoundError."""
    with _buffer(source) as data:
        start = tags.front(data)
        repaired = start > 0 and not mpeg.frame_of(data[start : start + 4])
        if repaired:  # only the decoder of MP3 skips tags
            source = data = data[start:]
            if not data:
                raise Unusable("empty", "holds only tags or zeros")
        extent = extent_of(lambda at, number: data[at : at + number], len(data))
        if extent and extent.patch:
            at, size = extent.patch
            source = data[:at] + size + data[at + len(size) :]
        notes: list[Note] = []
        try:
            file = _open(source)
        except Unusable:
            if why := _why(data, extent):
                raise why from None
            at = -1 if extent else mpeg.first(data)
            if at < 0:
                raise
            source = data = data[at:]
            file, repaired = _open(source), True
            if at != start:
                reason = f"begins with {at} bytes that are no MPEG audio; they are not used"
                notes.append(Note("length corrected", reason))
        if extent and extent.first + extent.size < len(data) and file.subtype not in WIDTHS:
            if file.format in BEHIND:
                whole = source if isinstance(source, bytes) else data
                file, source = _open_first(file, whole, extent.first + extent.size)
        found = Opened([Stream(file, source, file.frames)], notes, repaired)
        try:
            if extent:
                _limit(found, extent)
            elif check := CHECKS.get(file.format):
                if not trusted:
                    check(found, data)
            else:
                _check_log(found)
            if what := UNCHECKED.get(file.format):
                raise Unusable("format", f"is {what}, not a recording; store it as WAV")
            _check_alike(found.streams)
        except BaseException:
            close(found.streams)
            raise
    return found


def close(streams: list[Stream]) -> None:
    for stream in streams:
        stream.file.close()


def encode_flac(samples: NDArray[np.int16], rate: int, level: int = 5) -> bytes:
    """Mono int16 [S] as 16-bit FLAC; level 0 (fast) to 8 (small). The result depends only on the
    input, the library and the level."""
    assert samples.dtype == np.int16 and samples.ndim == 1, (samples.dtype, samples.shape)
    buffer = io.BytesIO()
    soundfile.write(
        buffer, samples, rate, format="FLAC", subtype="PCM_16", compression_level=level / 8
    )
    return buffer.getvalue()


@contextlib.contextmanager
def _buffer(source: bytes | Path) -> Iterator[Buffer]:
    if isinstance(source, bytes):
        if not source:
            raise Unusable("empty", "is empty")
        yield source
        return
    with open(source, "rb") as raw:
        if not os.fstat(raw.fileno()).st_size:
            raise Unusable("empty", "is empty")
        with mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_READ) as data:
            yield data


def _open(source: bytes | Path) -> _File:
    try:
        file = _File(_Bytes(source) if isinstance(source, bytes) else os.fspath(source))
    except soundfile.SoundFileError as error:
        reason = f"is not audio that libsndfile reads: {_reason(error)}"
        raise Unusable("format", reason) from None
    if file.samplerate < 1 or file.channels < 1:
        file.close()
        reason = f"states {file.samplerate} Hz and {file.channels} channels"
        raise Unusable("damaged", reason)
    return file


def _open_first(file: _File, data: Buffer, size: int) -> tuple[_File, bytes]:
    """The first bytes of a file that is open."""
    source = data[:size]
    opened = _open(source)
    file.close()
    return opened, source


def _reason(error: soundfile.SoundFileError) -> str:
    return str(getattr(error, "error_string", error)).removeprefix("Error : ").rstrip(".")


def _why(data: Buffer, extent: Extent | None) -> Unusable | None:
    """A better reason than that of libsndfile, if there is one."""
    if extent and extent.rest:
        return _unexplained(_behind(extent, extent.frame * extent.rate)[0])
    if data[:4] == b"OggS" and not foreign.why(data):
        try:
            ogg.streams(data)
        except Unusable as error:
            return error
    return foreign.why(data)


def _check_alike(streams: list[Stream]) -> None:
    """Raises Unusable for streams that cannot be joined, or without audio."""
    kinds = [(stream.file.samplerate, stream.file.channels) for stream in streams]
    for rate, channels in kinds[1:]:
        if (rate, channels) != kinds[0]:
            raise Unusable(
                "format",
                f"consists of joined files with {kinds[0][0]} Hz, {kinds[0][1]} channels and with "
                f"{rate} Hz, {channels} channels",
            )
    if kinds[0][1] > LARGEST_ARRAY:
        raise Unusable("format", f"states {kinds[0][1]} channels, more than {LARGEST_ARRAY}")
    frames = sum(stream.frames for stream in streams)
    if frames <= 0:
        raise Unusable("empty", "contains no audio")
    if frames >= UNKNOWN_FRAMES:
        raise Unusable("format", "does not state its length (streamed FLAC)")


# --------------------------------------------------------------------------------------- containers


def _limit(found: Opened, extent: Extent) -> None:
    """Uses the samples that the header states, and reports other bytes."""
    stream = found.streams[0]
    file = stream.file
    frame = WIDTHS.get(file.subtype, 0) * file.channels
    if frame and stream.frames > extent.size // frame:
        stream.frames = extent.size // frame
    if (file.format, file.subtype) == ("WAV", "GSM610"):  # libsndfile adds a block
        stream.frames = min(stream.frames, extent.size // GSM_BLOCK[0] * GSM_BLOCK[1])
    found.repaired = found.repaired or not extent.stated or extent.rest > 0
    if extent.rest:
        # Compressed samples have no fixed size: their average is taken.
        average = extent.size * file.samplerate // max(1, stream.frames)
        reason, seconds = _behind(extent, frame * file.samplerate or average)
        if seconds > UNEXPLAINED:
            raise _unexplained(reason)
        found.notes.append(Note("length corrected", f"{reason}; they are not used"))
    if file.subtype.startswith("ALAC") and extent.frames != stream.frames:
        raise Unusable(
            "damaged",
            f"decodes to {stream.frames} frames, but its packets hold {extent.frames}",
        )
    if frame and extent.frames and extent.frames != stream.frames:
        stated, there = (frames / file.samplerate for frames in (extent.frames, stream.frames))
        reason = f"states {stated:.2f} s, but has samples for {there:.2f} s, which are used"
        found.notes.append(Note("length corrected", reason))


def _behind(extent: Extent, per_second: int) -> tuple[str, float]:
    """(what is said about bytes behind the samples, how many seconds they may be). per_second:
    bytes of a second; 0 if it is not known."""
    seconds = extent.rest / per_second if per_second else 0.0
    length = f" ({seconds:.2f} s)" if seconds else ""
    return f"has {extent.rest} bytes{length} behind the samples that its header states", seconds


def _unexplained(reason: str) -> Unusable:
    return Unusable(
        "length", f"{reason}, and no chunk explains them; if they are samples, correct the header"
    )


def _check_log(found: Opened) -> None:
    """Compares a rare container with its header as libsndfile describes it."""
    stream = found.streams[0]
    log = stream.file.extra_info
    stated, there = stream.frames, stream.frames
    if found_frames := re.search(r"^\s*Frames\s*: (\d+)", log, re.MULTILINE):
        stated = int(found_frames[1])
    if found_bytes := re.search(r"(\d+) should be (\d+)", log):
        stated, there = map(int, found_bytes.groups())
    if stated > there or "truncated" in log:
        raise Unusable("truncated", "is truncated: its header states more samples than are left")
    if stated < there:
        raise Unusable("length", "has more samples than its header states")


def _check_flac(found: Opened, data: Buffer) -> None:
    starts = flac.joined(data) or [0]
    pieces = list(zip(starts, [*starts[1:], len(data)], strict=True))
    if len(pieces) == 1 and found.streams[0].frames < UNKNOWN_FRAMES:
        flac.check_plausible(data, found.streams[0].frames)
    stated = [flac.stated_frames(data, start) for start, _ in pieces]
    there = [flac.last_frame(data, start, stop) for start, stop in pieces]
    if len(pieces) == 1 and stated[0] >= there[0]:
        return
    streams = []
    for (start, stop), said, counted in zip(pieces, stated, there, strict=True):
        whole = flac.with_frames(data, start, stop, max(said, counted))
        streams.append(Stream(_open(whole), whole, max(said, counted)))
    close(found.streams)
    found.streams, found.repaired = streams, True
    if all(stated):
        _corrected(found, stated[0], streams, "FLAC")


def _check_ogg(found: Opened, data: Buffer) -> None:
    pieces, rest = ogg.streams(data)
    if rest:
        reason = f"has {rest} bytes behind its last Ogg page; they are not used"
        found.notes.append(Note("length corrected", reason))
    if pieces == [(0, len(data))]:
        return
    first = found.streams[0].frames
    close(found.streams)
    found.streams = []
    for start, stop in pieces:
        source = data[start:stop]
        file = _open(source)
        found.streams.append(Stream(file, source, file.frames))
    found.repaired = True
    if len(pieces) > 1:
        _corrected(found, first, found.streams, "Ogg")


def _corrected(found: Opened, first: int, streams: list[Stream], name: str) -> None:
    rate = streams[0].file.samplerate
    total = sum(stream.frames for stream in streams) / rate
    what = f"consists of {len(streams)} joined {name} files" if len(streams) > 1 else "is longer"
    reason = f"{what}; its first header states {first / rate:.2f} s, but {total:.2f} s are used"
    found.notes.append(Note("length corrected", reason))


def _check_mp3(found: Opened, data: Buffer) -> None:
    audio = mpeg.scan(data)
    if audio.exact or not audio.frames:  # without frames: the free format, which has no sizes
        return
    stated = sum(audio.stated)
    junk = audio.junk + audio.rest * (not audio.complete)
    if junk > mpeg.JUNK:
        raise Unusable("damaged", f"{junk} bytes between its frames are not MPEG audio")
    if stated > audio.frames + (not audio.cut):  # some encoders count their header as a frame
        raise Unusable(
            "truncated",
            f"is truncated: its header states {audio.seconds(stated):.2f} s, but it has "
            f"{audio.seconds(audio.frames):.2f} s",
        )
    if audio.cut and not stated:
        raise Unusable("truncated", "is truncated: its last frame is incomplete")
    whole = mpeg.rebuilt(data, audio)
    file = _open(whole)
    before = found.streams[0].frames
    close(found.streams)
    found.streams, found.repaired = [Stream(file, whole, file.frames)], True
    if before == file.frames and (audio.complete or not audio.stated):
        if audio.junk:
            reason = f"has {audio.junk} bytes between its frames that are not MPEG audio"
            found.notes.append(Note("length corrected", f"{reason}; they are not used"))
        return
    rate = file.samplerate
    what = (
        f"its headers state {audio.seconds(stated):.2f} s"
        if stated
        else f"no header states its length, which libsndfile estimates as {before / rate:.2f} s"
    )
    reason = f"{what}; all {file.frames / rate:.2f} s of its frames are used"
    found.notes.append(Note("length corrected", reason))


CHECKS: dict[str, Callable[[Opened, Buffer], None]] = {
    "FLAC": _check_flac,
    "OGG": _check_ogg,
    "MP3": _check_mp3,
}
