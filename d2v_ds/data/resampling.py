"""Changes the sample rate of audio: a waveform [S] to [ceil(S * new / old)]."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Waveform = NDArray[np.float32]

ZERO_CROSSINGS = 32  # of the sinc, on each side
ROLLOFF = 0.95  # of the lower Nyquist frequency: the window's transition then ends at it
BLOCK = 1 << 20  # elements of unfolded input at a time
MAX_KERNEL = 1 << 24  # elements; above this, only the weights that are not zero are computed


def resampling_reach(old: int, new: int) -> int:
    """The number of inputs on each side that an output of `resample` depends on."""
    return 0 if old == new else math.ceil(ZERO_CROSSINGS / (ROLLOFF * min(1.0, new / old)))


def resample(x: Waveform, old: int, new: int) -> Waveform:
    """[S] at rate `old` to [ceil(S * new / old)] at rate `new`: sinc interpolation, Hann window.

    The band-limited interpolation of Smith and Gossett (1984) as a matrix product: in numpy, so
    that converting needs no torch, and in float64, so that the result after rounding to 16 bits
    does not depend on BLAS or the number of threads. torchaudio's resampler, a float32 convolution,
    gives other 16-bit values on CPUs with other instruction sets.
    """
    if old == new:
        return x
    length = -(-len(x) * new // old)
    divisor = math.gcd(old, new)
    old, new = old // divisor, new // divisor
    if (2 * resampling_reach(old, new) + old) * new > MAX_KERNEL:
        return _resample_by_rows(x, old, new, length)
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
    reach = resampling_reach(old, new)
    ratio = min(1.0, new / old)
    repeats = max(1, reach // old)
    old, new = old * repeats, new * repeats
    taps = np.arange(-reach, old + reach)[:, None]
    kernel = _weights(np.arange(new) * old / new - taps, ratio)
    return old, new, reach, kernel / kernel.sum(axis=0)  # unit gain at 0 Hz


def _weights(distance: NDArray[np.float64], ratio: float) -> NDArray[np.float64]:
    """Weights of inputs at a distance, in inputs, from an output; ratio: min(1, new / old)."""
    distance = ROLLOFF * ratio * distance  # in zero crossings
    window = np.cos(np.clip(distance / ZERO_CROSSINGS, -1, 1) * (np.pi / 2)) ** 2
    sinc: NDArray[np.float64] = np.sinc(distance) * window
    return sinc


def _resample_by_rows(x: Waveform, old: int, new: int, length: int) -> Waveform:
    """As `resample`, for rates without a small ratio, such as 22,254:16,000: output i is the
    product of one row of weights and the inputs around i * old / new. The weights repeat after
    `new` outputs, which are computed in blocks of bounded size."""
    reach = resampling_reach(old, new)
    taps = 2 * reach + 2
    padded = np.zeros(len(x) + taps + -(-old // new))
    padded[reach : reach + len(x)] = x
    windows = np.lib.stride_tricks.sliding_window_view(padded, taps)
    result = np.empty(length, np.float32)
    rows = max(1, BLOCK // taps)
    for first in range(0, min(new, length), rows):
        inputs, weights = _rows(old, new, first, min(rows, new - first, length - first))
        for period in range(-(-(length - first) // new)):
            start = period * new + first
            kept = min(len(weights), length - start)
            around = windows[inputs[:kept] + period * old]
            result[start : start + kept] = np.einsum("ij,ij->i", around, weights[:kept])
    return result


@lru_cache(maxsize=4)
def _rows(
    old: int, new: int, first: int, number: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """(input [number], weights [number, 2 * reach + 2]) of the outputs from `first` on: the weights
    are those of the inputs from `reach` before the input to reach + 1 after it."""
    reach = resampling_reach(old, new)
    inputs, rest = np.divmod(np.arange(first, first + number, dtype=np.int64) * old, new)
    distance = (rest / new)[:, None] - np.arange(-reach, reach + 2)
    weights = _weights(distance, min(1.0, new / old))
    weights /= weights.sum(axis=1, keepdims=True)
    return inputs, weights
