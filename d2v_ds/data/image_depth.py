"""Pixel values of more than 8 bits -> 8 bits.

    integers of 16 or 32 bits, floating-point numbers [h, w] -> 0 to 255

The scale is what the file states, else it follows from the largest value; both are noted. h, w
pixels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from d2v_ds.data.checks import Note, Unusable

Grey = npt.NDArray[np.uint8]  # [h, w]

DEPTHS = (8, 10, 12, 14, 16, 24, 32)  # bits of the samples that cameras and scanners write
DARK = 16  # floating-point images that are brighter than 1 but darker than this have no known scale


def bits_of(largest: int, stated: int = 0) -> int:
    """Bits per sample of an image: those that the file states if the samples fit into them, else
    the smallest usual number that holds its largest sample, because 10 to 14 bits are often stored
    in numbers of 16 without saying so."""
    if stated and largest < 1 << stated:
        return stated
    return next(bits for bits in DEPTHS if largest < 1 << bits)


def scaled(values: npt.NDArray[Any], bits: int) -> Grey:
    """Samples of `bits` bits -> 0 to 255, rounded."""
    full = (1 << bits) - 1
    if bits > 16:
        wide: Grey = np.rint(values * (255 / full)).astype(np.uint8)
        return wide
    table: Grey = ((np.arange(full + 1, dtype=np.int64) * 255 + full // 2) // full).astype(np.uint8)
    grey: Grey = table[values]
    return grey


def of_integers(values: npt.NDArray[Any], most: int, stated: int, notes: list[Note]) -> Grey:
    """most: bits of a sample without its sign. stated: as for `bits_of`. Raises Unusable if there
    are negative values, of which no full scale is known."""
    if most == 32 and values.dtype == np.int32 and values.min() < 0:
        values = values.view(np.uint32)  # Pillow has no unsigned numbers of 32 bits
    low, high = int(values.min()), int(values.max())
    if low < 0:
        raise Unusable("range", f"its values are {low} to {high}; negative ones have no scale")
    bits = bits_of(high, stated)
    if high < 1 << most:
        bits = min(bits, most)
    notes.append(Note("depth", f"grey values {low} to {high}, read as {bits} bits, became 8 bits"))
    return scaled(values, bits)


def of_floats(values: npt.NDArray[Any], notes: list[Note]) -> Grey:
    """0 to 1 or 0 to 255 -> 0 to 255. Raises Unusable for other ranges."""
    if not np.isfinite(values).all():
        raise Unusable("not finite", "has values that are NaN or infinite")
    low, high = float(values.min()), float(values.max())
    if low < 0 or high > 255 or 1 < high < DARK:
        raise Unusable(
            "range", f"its values are {low:g} to {high:g}, neither from 0 to 1 nor from 0 to 255"
        )
    notes.append(Note("depth", f"floating-point values {low:g} to {high:g} became 8 bits"))
    grey: Grey = np.rint(values * (255 if high <= 1 else 1)).astype(np.uint8)
    return grey
