"""The values that a setting may have, stated with its type:

    steps: Positive = 1000

decoding.py checks them. Every number must be finite, and none is so large that arithmetic with it
overflows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

LARGEST = 10**12  # of numbers without a limit of their own


@dataclass(frozen=True)
class Bounds:
    """An interval of numbers. An open end is not in it."""

    low: float
    high: float = LARGEST
    open_low: bool = False
    open_high: bool = False
    zero: str = ""  # the meaning of 0, for messages

    def allow(self, value: float) -> bool:
        above = value > self.low if self.open_low else value >= self.low
        return above and (value < self.high if self.open_high else value <= self.high)

    def describe(self, value: float) -> str:
        """What is allowed, for a value that is not."""
        low, high = f"{self.low:.15g}", f"{self.high:.15g}"
        if self.high <= 1:
            return (
                f"in {'(' if self.open_low else '['}{low}, {high}{')' if self.open_high else ']'}"
            )
        if value > self.high:
            return f"at most {high}"
        if self.open_low:
            return f"above {low}"
        if self.low == 0:
            return f"0 ({self.zero}) or more" if self.zero else "0 or more"
        return f"at least {low}"


Count = Annotated[int, Bounds(0)]
OffCount = Annotated[int, Bounds(0, zero="off")]
Positive = Annotated[int, Bounds(1)]
MicroBatches = Annotated[int, Bounds(1, 10**6)]
Seed = Annotated[int, Bounds(-(2**63), 2**63 - 1)]
Processes = Annotated[int, Bounds(0, 1024)]
Threads = Annotated[int, Bounds(0, 4096)]
# Of models and inputs: far above any use, and small enough for sizes to be computed.
Width = Annotated[int, Bounds(1, 2**17)]
Layers = Annotated[int, Bounds(1, 10_000)]
MoreLayers = Annotated[int, Bounds(0, 10_000)]
Views = Annotated[int, Bounds(1, 1024)]
Amount = Annotated[float, Bounds(0)]
OffAmount = Annotated[float, Bounds(0, zero="off")]
Seconds = Annotated[float, Bounds(0, 1e5, open_low=True)]
Factor = Annotated[float, Bounds(0, open_low=True)]
Share = Annotated[float, Bounds(0, 1)]
InnerShare = Annotated[float, Bounds(0, 1, open_low=True, open_high=True)]
PositiveShare = Annotated[float, Bounds(0, 1, open_low=True)]
BelowOne = Annotated[float, Bounds(0, 1, open_high=True)]
