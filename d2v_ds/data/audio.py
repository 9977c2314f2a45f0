"""One audio file: header, samples, FLAC, log-mel features.

    bytes or a path -> info
                    -> decode -> mono float32 [S] in [-1, 1] -> resample -> encode_flac
                                                             -> log_mel [T, 40]

S raw audio samples, T feature frames. libsndfile (audio_files.py) decodes; torchaudio no longer
does. Unusable audio raises Unusable, a ValueError, with the reason, without the file's name.
"""

from __future__ import annotations

import math
import struct
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from d2v_ds.data.audio_files import close, open_streams, out_of_range
from d2v_ds.data.audio_files import encode_flac as encode_flac
from d2v_ds.data.checks import Note, Unusable
from d2v_ds.data.containers import extent_of
from d2v_ds.data.resampling import resample as resample
from d2v_ds.data.resampling import resampling_reach as resampling_reach

if TYPE_CHECKING:
    from torch import Tensor

Waveform = NDArray[np.float32]

INT16_SCALE = 32768.0
SILENCE = 8 / INT16_SCALE  # of samples in [-1, 1]; dither alone spans a few steps of 16 bits
GLANCE = 256  # samples
CANCELLED = 0.1  # power of the mean of channels, relative to that of unrelated channels
CHUNK = struct.Struct("<4sI")  # of a WAV: name and size
FLOATS = ("FLOAT", "DOUBLE")  # subtypes that can hold any value
LOUDEST = 16.0  # peak of floats in [-1, 1] that were amplified (24 dB)
QUIETEST = 256.0  # peak of integers that were stored as floats (16 bits: -42 dB)
FULL_SCALES = {16: 2.0**15, 24: 2.0**23, 32: 2.0**31}  # by bits
ABOVE = 1.5  # times full scale that integers stored as floats may reach after filters
LARGEST = ABOVE * FULL_SCALES[32]  # of floats; squares of larger ones may exceed float32
MEASURED = 1 << 20  # frames at a time
CACHED = 1 << 14  # samples at a time, because new memory costs more than the arithmetic
# Speech that fits into its range has far less than 0.1 % of its samples at its peak. One in a
# hundred, in runs of three or more with the same value, means that loud vowels are cut off, because
# the input level was set too high. Without clipping, a peak has one such sample or two.
CLIPPED = 0.01  # share of samples
CLIPPED_LEVEL = 0.97  # of full scale; the largest values of 8-bit formats are 0.98 to 0.99


@dataclass(frozen=True)
class Info:
    rate: int  # frames per second
    frames: int
    channels: int
    format: str  # libsndfile's names: WAV, FLAC, ...
    subtype: str  # PCM_16, FLOAT, ...


def info(source: bytes | Path) -> Info:
    """The header; the length is as libsndfile estimates it. Raises Unusable if the source is not
    audio, is empty, or is truncated according to its header."""
    with Recording(source, trusted=True) as recording:
        return recording.info


def decode(
    source: bytes | Path, start: int = 0, frames: int = -1, channel: int | None = None
) -> Waveform:
    """`frames` frames (-1: all) from `start` on, of one channel or the mean of all: float32 [S] in
    [-1, 1], or beyond if a float file exceeds it.

    16-bit audio is exact: rint(32768 * x) is the stored value. Raises Unusable if the part that
    is read is damaged, shorter than requested, or contains NaN, infinity or values beyond LARGEST.
    """
    with Recording(source) as recording:
        return as_float(recording.pcm(start, frames, channel))


def as_float(pcm: NDArray[Any]) -> Waveform:
    """int16 or float32 [S] as float32 in [-1, 1]."""
    if pcm.dtype == np.float32:
        return pcm
    x: Waveform = pcm.astype(np.float32)
    x *= 1.0 / INT16_SCALE
    return x


def is_silent(pcm: NDArray[Any]) -> bool:
    """Whether audio [S], int16 or float32 in [-1, 1], has no sound: its samples span less than
    SILENCE. The converter, `verify` and the loader use this one test. Every part of a silent
    recording is silent, which a limit of the variance would not ensure."""
    limit = SILENCE * (INT16_SCALE if pcm.dtype == np.int16 else 1.0)
    middle = len(pcm) // 2
    if _span(pcm[middle : middle + GLANCE]) >= limit:  # a few samples usually show the sound
        return False
    return _span(pcm) < limit


def _span(pcm: NDArray[Any]) -> float:
    return float(pcm.max()) - float(pcm.min())


class Recording:
    """An open audio file; a context manager. Raises Unusable.

    trusted: only what libsndfile finds, without looking for more audio than the header states.
    clipping: notes clipped samples too, which takes time and changes nothing.
    """

    def __init__(self, source: bytes | Path, trusted: bool = False, clipping: bool = False) -> None:
        self.clipping = clipping
        self.notes: list[Note] = []  # what was altered to read the file
        self.decoded: list[Note] = []  # what was altered in the parts that were decoded
        self.repaired = False  # whether other readers would decode something else
        self._scale = 0.0  # 0: not known yet
        self.plain = _plain_wav(source) if isinstance(source, bytes) else None
        if self.plain:
            rate, samples = self.plain
            self.info = Info(rate, len(samples), samples.shape[1], "WAV", "PCM_16")
            if not rate:
                raise Unusable("rate", "states a sample rate of 0")
            return
        opened = open_streams(source, trusted)
        self.notes, self.repaired, self.streams = opened.notes, opened.repaired, opened.streams
        file = self.streams[0].file
        frames = sum(stream.frames for stream in self.streams)
        self.info = Info(file.samplerate, frames, file.channels, file.format, file.subtype)

    def __enter__(self) -> Recording:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        if not self.plain:
            close(self.streams)

    def pcm(self, start: int = 0, frames: int = -1, channel: int | None = None) -> NDArray[Any]:
        """As `decode`, but returns the stored int16 [S] if 16-bit audio needs no mean.

        For a plain WAV the result is a view of its bytes. If the channels cancel each other, one of
        them is returned instead of the mean, with a note.
        """
        wanted = self.info.frames - start if frames < 0 else frames
        stop = start + wanted
        if not 0 < wanted <= self.info.frames - start:
            raise Unusable(
                "segment", f"frames {start} to {stop} requested, but it has only {self.info.frames}"
            )
        data = self.plain[1][start:stop] if self.plain else self._read(start, stop)
        if self.clipping:
            self._note_clipping(data if channel is None else data[:, channel : channel + 1])
        if self.info.channels == 1 or channel is not None:
            one: NDArray[Any] = np.ascontiguousarray(data[:, channel or 0])
            return one
        x: Waveform = data.astype(np.float32)
        if data.dtype == np.int16:
            x *= 1.0 / INT16_SCALE
        mean = _mean(x)
        loudest = _instead_of(mean, x)
        if loudest is None:
            return mean
        reason = f"its channels cancel each other; channel {loudest} is used"
        self.decoded.append(Note("one channel", reason))
        return np.ascontiguousarray(data[:, loudest])

    def _note_clipping(self, data: NDArray[Any]) -> None:
        full = INT16_SCALE if data.dtype == np.int16 else self.scale
        share = clipped_share(data, full)
        if share > CLIPPED:
            reason = f"{share:.1%} of its samples are clipped: the recording was too loud"
            self.decoded.append(Note("clipped", reason))

    @property
    def scale(self) -> float:
        """The divisor that brings float samples into [-1, 1]; 1 for other files. Reads the
        whole recording. Raises Unusable if no full scale fits the samples."""
        if self.info.subtype not in FLOATS:
            return 1.0
        if not self._scale:
            peak, whole = self._measured()
            self._scale, reason = full_scale(peak, whole)
            if reason:
                self.notes.append(Note("scaled", reason))
        return self._scale

    def _measured(self) -> tuple[float, bool]:
        """(largest absolute value, whether all values are integers)."""
        peak, whole = 0.0, True
        for start in range(0, self.info.frames, MEASURED):
            data = self._read(start, min(start + MEASURED, self.info.frames))
            peak = max(peak, float(data.max()), -float(data.min()))
            whole = whole and peak > 1 and bool((data == np.rint(data)).all())
        return peak, whole

    def _read(self, start: int, stop: int) -> NDArray[Any]:
        """The frames start to stop, [frames, channels], of all streams."""
        pieces = []
        for stream in self.streams:
            if start < min(stop, stream.frames):
                pieces.append(stream.read(max(0, start), min(stop, stream.frames)))
            start, stop = start - stream.frames, stop - stream.frames
            if stop <= 0:
                break
        data = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
        if data.dtype != np.int16:
            low, high = checked_range(data)
            if len(data) == self.info.frames and -1 <= low <= high <= 1:
                self._scale = 1.0
        return data


def checked_range(x: NDArray[Any]) -> tuple[float, float]:
    """(smallest, largest) value of float samples, of which there is at least one. Raises Unusable
    for NaN, for infinity, and for values beyond every full scale: a single damaged bit makes a
    sample 1e38, and normalisation would turn that into NaN."""
    low, high = float(x.min()), float(x.max())  # NaN if there is one
    if not math.isfinite(low) or not math.isfinite(high):
        raise Unusable("not finite", "contains NaN or infinite samples")
    if (peak := max(-low, high)) > LARGEST:
        raise out_of_range(peak)
    return low, high


def clipped_share(pcm: NDArray[Any], full: float) -> float:
    """The share of samples [S, channels] in runs of the largest or the smallest value, near full
    scale, of the channel with most of them. Shares below CLIPPED may be returned as 0."""
    limit = CLIPPED_LEVEL * full
    if float(pcm.max()) < limit and -float(pcm.min()) < limit:  # most recordings
        return 0.0
    most = 0.0
    for x in np.ascontiguousarray(pcm.T):
        found = 0
        for value in (x.max(), x.min()):
            if abs(float(value)) >= limit:
                marked = x == value
                if np.count_nonzero(marked) >= CLIPPED / 8 * len(x):
                    found += _in_runs(marked)
        most = max(most, found / len(x))
    return most


def _in_runs(marked: NDArray[np.bool_]) -> int:
    """The number of marked samples [S] in runs of three or more."""
    starts = marked[:-2] & marked[1:-1] & marked[2:]
    runs = np.count_nonzero(starts[1:] > starts[:-1]) + np.count_nonzero(starts[:1])
    return int(np.count_nonzero(starts) + 2 * runs)


def full_scale(peak: float, integers: bool) -> tuple[float, str]:
    """(divisor, reason) for float samples with this peak; integers: all of them are integers.
    Raises Unusable if they are neither amplified samples nor integers of a usual width."""
    if peak <= 1:
        return 1.0, ""
    if peak <= LOUDEST and not (integers and peak >= 2):
        return peak, f"peaks at {peak:.3g}; divided by it"
    bits = next((bits for bits, scale in FULL_SCALES.items() if peak <= ABOVE * scale), 0)
    if not bits or peak < QUIETEST:
        raise out_of_range(peak)
    divisor = max(FULL_SCALES[bits], peak)
    return divisor, f"peaks at {peak:.6g}, as {bits}-bit integers do; divided by {divisor:.6g}"


def _mean(x: Waveform) -> Waveform:
    """Of the channels, [S, channels] -> [S]; as x.mean(axis=1), which is far slower for a few."""
    if x.shape[1] > 4:
        mean: Waveform = x.mean(axis=1, dtype=np.float32)
        return mean
    total: Waveform = x[:, 0] + x[:, 1]
    for channel in range(2, x.shape[1]):
        total += x[:, channel]
    total /= np.float32(x.shape[1])
    return total


def _instead_of(mean: Waveform, x: Waveform) -> int | None:
    """The channel to use instead of the mean [S] of the channels x [S, channels]: None, or the
    loudest one if they cancel each other. The mean of unrelated channels has their summed power,
    divided by the square of their number."""
    channels = x.shape[1]
    total = float(np.dot(x.ravel(), x.ravel()))
    if float(np.dot(mean, mean)) * channels**2 >= CANCELLED * total:
        return None
    return int(np.argmax(np.einsum("ij,ij->j", x, x)))


def _plain_wav(source: bytes) -> tuple[int, NDArray[np.int16]] | None:
    """(rate, [S, channels]) of an intact WAV with 16-bit PCM, without a copy; None for everything
    else, which is left to libsndfile."""
    if source[:4] != b"RIFF" or source[8:12] != b"WAVE":
        return None
    rate = channels = 0
    first = 12
    while first + 8 <= len(source):
        kind, size = CHUNK.unpack_from(source, first)
        first += CHUNK.size
        if kind == b"fmt " and size >= 16 and first + 16 <= len(source):
            coding, channels, rate, _, frame, bits = struct.unpack_from("<HHIIHH", source, first)
            if coding != 1 or bits != 16 or frame != 2 * channels:
                return None
        elif kind == b"data":
            frames = size // (2 * channels) if channels else 0
            if not frames or size % (2 * channels) or first + size > len(source):
                return None
            if first + size < len(source) - 1 and not _is_explained(source):
                return None
            samples = np.frombuffer(source, "<i2", frames * channels, first)
            return rate, samples.reshape(frames, channels)
        first += size + size % 2
    return None


def _is_explained(wav: bytes) -> bool:
    """Whether only metadata follows the samples."""
    extent = extent_of(lambda at, number: wav[at : at + number], len(wav))
    return extent is not None and not extent.rest


def to_int16(x: Waveform) -> NDArray[np.int16]:
    """[S] in [-1, 1] as int16, rounded and clipped; the inverse of `decode` for 16-bit audio."""
    result = np.empty(len(x), np.int16)
    for start in range(0, len(x), CACHED):
        part = x[start : start + CACHED] * np.float32(INT16_SCALE)
        np.rint(part, out=part)
        np.clip(part, -32768, 32767, out=part)
        result[start : start + CACHED] = part
    return result


# ---------------------------------------------------------------------------------------- features


def log_mel(x: Waveform | Tensor, rate: int) -> Tensor:
    """[S] in [-1, 1] -> [T, 40] log-mel energies of windows of 25 ms every 10 ms, as Kaldi's fbank.
    Raises Unusable for less than one window."""
    import torch

    waveform = torch.as_tensor(x, dtype=torch.float32) * INT16_SCALE  # Kaldi's scale
    if len(waveform) < int(rate * 0.025):
        raise Unusable("too short", f"{len(waveform)} samples are shorter than one window of 25 ms")
    fbank = import_torchaudio().compliance.kaldi.fbank
    features: Tensor = fbank(
        waveform[None], num_mel_bins=40, sample_frequency=float(rate), dither=0.0
    )
    return features


def import_torchaudio() -> Any:
    """torchaudio, even if its wheel is built for CUDA and torch is not.

    The package index only has torchaudio for CUDA. With a CPU build of torch its compiled extension
    does not load and the import fails. Everything used here is plain Python, so the extension is
    then replaced by one that raises an error when it is used.
    """
    try:
        import torchaudio
    except OSError:
        for name in [n for n in sys.modules if n.partition(".")[0] == "torchaudio"]:
            del sys.modules[name]
        sys.modules["torchaudio._extension"] = _no_extension()
        import torchaudio
    return torchaudio


def _no_extension() -> types.ModuleType:
    def unavailable(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            raise RuntimeError("torchaudio's compiled extension does not load with this torch")

        return call

    module: Any = types.ModuleType("torchaudio._extension")
    module._check_cuda_version = lambda: None
    module._IS_TORCHAUDIO_EXT_AVAILABLE = module._IS_ALIGN_AVAILABLE = False
    module.fail_if_no_align = unavailable
    return module  # type: ignore[no-any-return]
