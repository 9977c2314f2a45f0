"""One audio file: header, samples, resampling, FLAC, log-mel features.

    bytes or a path -> info
                    -> decode -> mono float32 [S] in [-1, 1] -> resample -> encode_flac
                                                             -> log_mel [T, 40]

S raw audio samples, T feature frames. libsndfile (soundfile) decodes; torchaudio no longer does.
Unusable audio raises ValueError with the reason, without the file's name.
"""

from __future__ import annotations

import io
import math
import os
import struct
import sys
import types
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import soundfile
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

Waveform = NDArray[np.float32]

INT16_SCALE = 32768.0
CHUNK = struct.Struct("<4sI")  # of a WAV: name and size
UNKNOWN_FRAMES = 1 << 48  # libsndfile reports 2^63 - 1 for a FLAC without a length
UNKNOWN_RIFF_SIZE = 0x7FFF0000  # streaming writers store 0, or this value or a larger one


@dataclass(frozen=True)
class Info:
    rate: int  # frames per second
    frames: int
    channels: int
    format: str  # libsndfile's names: WAV, FLAC, ...
    subtype: str  # PCM_16, FLOAT, ...


def info(source: bytes | Path) -> Info:
    """The header. Raises ValueError if the source is not audio, is empty, or is a truncated WAV."""
    with Recording(source) as recording:
        return recording.info


def decode(
    source: bytes | Path, start: int = 0, frames: int = -1, channel: int | None = None
) -> Waveform:
    """`frames` frames (-1: all) from `start` on, of one channel or the mean of all: float32 [S] in
    [-1, 1].

    16-bit audio is exact: rint(32768 * x) is the stored value. Raises ValueError if the part that
    is read is damaged, shorter than requested, or contains NaN or infinity.
    """
    with Recording(source) as recording:
        data = recording.pcm(start, frames, channel)
    if data.dtype == np.float32:
        return data
    x: Waveform = data.astype(np.float32)
    x *= 1.0 / INT16_SCALE
    return x


class Recording:
    """An open audio file; a context manager. Raises ValueError as `info` does."""

    def __init__(self, source: bytes | Path) -> None:
        self.plain = _plain_wav(source) if isinstance(source, bytes) else None
        if self.plain:
            rate, samples = self.plain
            self.info = Info(rate, len(samples), samples.shape[1], "WAV", "PCM_16")
        else:
            self.file = file = _open(source)
            self.info = Info(file.samplerate, file.frames, file.channels, file.format, file.subtype)

    def __enter__(self) -> Recording:
        return self

    def __exit__(self, *exception: object) -> None:
        if not self.plain:
            self.file.close()

    def pcm(self, start: int = 0, frames: int = -1, channel: int | None = None) -> NDArray[Any]:
        """As `decode`, but returns the stored int16 [S] if 16-bit audio needs no mean.

        For a plain WAV the result is a view of its bytes.
        """
        wanted = self.info.frames - start if frames < 0 else frames
        stop = start + wanted
        if not 0 < wanted <= self.info.frames - start:
            raise ValueError(
                f"frames {start} to {stop} requested, but it has only {self.info.frames}"
            )
        data = self.plain[1][start:stop] if self.plain else _read(self.file, start, stop)
        if self.info.channels == 1 or channel is not None:
            one: NDArray[Any] = np.ascontiguousarray(data[:, channel or 0])
            return one
        x: Waveform = data.astype(np.float32)
        if data.dtype == np.int16:
            x *= 1.0 / INT16_SCALE
        mean: Waveform = x.mean(axis=1, dtype=np.float32)
        return mean


def _read(file: soundfile.SoundFile, start: int, stop: int) -> NDArray[Any]:
    """The frames `start` to `stop`, [frames, channels]: int16 if the file has at most 16 bits,
    otherwise float32."""
    # Reading int16 is several times faster than float32, which libsndfile needs for wider samples
    # and for float files, whose values it does not scale to integers.
    exact = file.subtype in ("PCM_16", "PCM_S8", "PCM_U8")
    try:
        if start:
            file.seek(start)
        data: NDArray[Any] = file.read(
            stop - start, dtype="int16" if exact else "float32", always_2d=True
        )
    except soundfile.SoundFileError as error:
        raise ValueError(f"cannot be decoded: {_reason(error)}") from None
    if len(data) != stop - start:
        raise ValueError(f"ends {stop - start - len(data)} frames before the length in its header")
    if not exact and not np.isfinite(data).all():
        raise ValueError("contains NaN or infinite samples")
    return data


def _plain_wav(source: bytes) -> tuple[int, NDArray[np.int16]] | None:
    """(rate, [S, channels]) of an intact WAV with 16-bit PCM, without a copy; None for everything
    else, which is left to libsndfile."""
    if source[:4] != b"RIFF" or source[8:12] != b"WAVE" or _promised(source) > len(source) + 1:
        return None
    rate = channels = 0
    first = 12
    while first + 8 <= len(source):
        kind, size = CHUNK.unpack_from(source, first)
        first += CHUNK.size
        if kind == b"fmt " and size >= 16:
            coding, channels, rate, _, _, bits = struct.unpack_from("<HHIIHH", source, first)
            if coding != 1 or bits != 16:
                return None
        elif kind == b"data":
            frames = size // (2 * channels) if channels else 0
            if not frames or size % (2 * channels) or first + size > len(source):
                return None
            samples = np.frombuffer(source, "<i2", frames * channels, first)
            return rate, samples.reshape(frames, channels)
        first += size + size % 2
    return None


def _open(source: bytes | Path) -> soundfile.SoundFile:
    """Raises ValueError; a missing file raises FileNotFoundError."""
    if isinstance(source, bytes):
        head, size = source[:12], len(source)
    else:
        with open(source, "rb") as raw:
            head, size = raw.read(12), os.fstat(raw.fileno()).st_size
    if size == 0:
        raise ValueError("is empty")
    if head[:4] == b"RIFF" and head[8:] == b"WAVE":  # libsndfile reads a truncated one silently
        if _promised(head) > size + 1:  # the last pad byte may be missing
            raise ValueError(f"is truncated: {size} of {_promised(head)} bytes")
    try:
        file = soundfile.SoundFile(
            io.BytesIO(source) if isinstance(source, bytes) else os.fspath(source)
        )
    except soundfile.SoundFileError as error:
        raise ValueError(f"is not audio that libsndfile reads: {_reason(error)}") from None
    if not 0 < file.frames < UNKNOWN_FRAMES:
        file.close()
        raise ValueError(
            "contains no audio" if file.frames <= 0 else "does not state its length (streamed FLAC)"
        )
    return file


def _promised(wav: bytes) -> int:
    """The size of a WAV according to its header; 0 if it does not say."""
    size = int.from_bytes(wav[4:8], "little") + 8
    return size if 8 < size < UNKNOWN_RIFF_SIZE else 0


def _reason(error: soundfile.SoundFileError) -> str:
    return str(getattr(error, "error_string", error)).removeprefix("Error : ").rstrip(".")


def encode_flac(samples: NDArray[np.int16], rate: int, level: int = 5) -> bytes:
    """Mono int16 [S] as 16-bit FLAC; level 0 (fast) to 8 (small). The result depends only on the
    input, the library and the level."""
    assert samples.dtype == np.int16 and samples.ndim == 1, (samples.dtype, samples.shape)
    buffer = io.BytesIO()
    soundfile.write(
        buffer, samples, rate, format="FLAC", subtype="PCM_16", compression_level=level / 8
    )
    return buffer.getvalue()


def to_int16(x: Waveform) -> NDArray[np.int16]:
    """[S] in [-1, 1] as int16, rounded and clipped; the inverse of `decode` for 16-bit audio."""
    clipped: NDArray[np.float32] = np.clip(np.rint(x * INT16_SCALE), -32768, 32767)
    return clipped.astype(np.int16)


# -------------------------------------------------------------------------------------- resampling

ZERO_CROSSINGS = 32  # of the sinc, on each side
ROLLOFF = 0.95  # of the lower Nyquist frequency: the window's transition then ends at it
BLOCK = 1 << 20  # elements of unfolded input at a time
MAX_KERNEL = 1 << 24  # elements; above this the rates have no small ratio


def resampling_reach(old: int, new: int) -> int:
    """The number of inputs on each side that an output of `resample` depends on."""
    return 0 if old == new else math.ceil(ZERO_CROSSINGS / (ROLLOFF * min(1.0, new / old)))


def resample(x: Waveform, old: int, new: int) -> Waveform:
    """[S] at rate `old` to [ceil(S * new / old)] at rate `new`: sinc interpolation, Hann window.

    The band-limited interpolation of Smith and Gossett (1984) as a matrix product: in numpy, so
    that converting needs no torch, and in float64, so that the result after rounding to 16 bits
    does not depend on BLAS or the number of threads. torchaudio's resampler, a float32 convolution,
    gives other 16-bit values on CPUs with other instruction sets. Raises ValueError for rates
    without a small ratio.
    """
    if old == new:
        return x
    length = -(-len(x) * new // old)
    old, new, reach, kernel = _sinc_kernel(old, new)
    steps = -(-length // new)
    padded = np.zeros(steps * old + 2 * reach)
    padded[reach : reach + len(x)] = x
    windows = np.lib.stride_tricks.sliding_window_view(padded, len(kernel))[::old]
    result = np.empty((steps, new))
    block = max(1, BLOCK // len(kernel))
    for i in range(0, steps, block):
        np.matmul(np.ascontiguousarray(windows[i : i + block]), kernel, out=result[i : i + block])
    return result.reshape(-1)[:length].astype(np.float32)


@lru_cache(maxsize=16)
def _sinc_kernel(old: int, new: int) -> tuple[int, int, int, NDArray[np.float64]]:
    """(inputs and outputs of a step, reach, kernel [2 * reach + inputs, outputs]): for each output
    the weights of the inputs from -reach to inputs + reach - 1. A step has about as many inputs as
    the sinc reaches to each side: fewer would unfold the input more often, more would multiply
    zeros."""
    divisor = math.gcd(old, new)
    old, new = old // divisor, new // divisor
    cutoff = ROLLOFF * min(1.0, new / old)  # of the input's Nyquist frequency
    reach = resampling_reach(old, new)
    if (2 * reach + old) * new > MAX_KERNEL:
        raise ValueError(f"the ratio of its rate to the target rate is not small ({old}:{new})")
    repeats = max(1, reach // old)
    old, new = old * repeats, new * repeats
    taps = np.arange(-reach, old + reach)[:, None]
    distance = cutoff * (np.arange(new) * old / new - taps)  # in zero crossings
    window = np.cos(np.clip(distance / ZERO_CROSSINGS, -1, 1) * (np.pi / 2)) ** 2
    kernel = np.sinc(distance) * window
    return old, new, reach, kernel / kernel.sum(axis=0)  # unit gain at 0 Hz


# ---------------------------------------------------------------------------------------- features


def log_mel(x: Waveform | Tensor, rate: int) -> Tensor:
    """[S] in [-1, 1] -> [T, 40] log-mel energies of windows of 25 ms every 10 ms, as Kaldi's fbank.
    Raises ValueError for less than one window."""
    import torch

    waveform = torch.as_tensor(x, dtype=torch.float32) * INT16_SCALE  # Kaldi's scale
    if len(waveform) < int(rate * 0.025):
        raise ValueError(f"{len(waveform)} samples are shorter than one window of 25 ms")
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
