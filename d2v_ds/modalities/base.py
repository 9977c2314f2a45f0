"""The contract of a modality: one file each, known to the rest through the registry alone.

B samples, M masked views a sample, T tokens, K visible tokens, N masked tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt
from torch import nn

from d2v_ds.batch import Batch
from d2v_ds.student import FrontEnd
from d2v_ds.transformer import TransformerConfig


@dataclass(frozen=True)
class ModalityConfig:
    """Settings that every modality has."""

    views: int = 8  # masked views of a sample for one pass of the teacher
    # parts of the front end that the teacher takes from the student instead of averaging its own
    shared: tuple[str, ...] = ()
    loss_beta: float = 0.0  # 0: squared error; above: smooth L1
    loss_scale: float | None = None  # per channel; null: 1 / sqrt(width)

    def __post_init__(self) -> None:
        if self.views < 1:
            raise ValueError(f"views={self.views} must be at least 1")
        if self.loss_beta < 0:
            raise ValueError(f"loss_beta={self.loss_beta} must be 0 or more")
        for name in self.shared:
            if name not in SHAREABLE:
                raise ValueError(f"shared: no part {name!r} (allowed: {', '.join(SHAREABLE)})")


SHAREABLE = ("features", "positions")


class Modality(Protocol):
    """Built from its own typed settings: `Speech(SpeechConfig(...))`.

    Lengths are in the unit of the shard index (audio frames at the sample rate, pixels, tokens).
    """

    name: ClassVar[str]
    unit: ClassVar[str]  # what batch.size counts, for people: "s", "images", "tokens"
    keys: ClassVar[tuple[str, ...]]  # tar members a sample must have one of, without the dot
    baseline_name: ClassVar[str]
    Config: ClassVar[type[ModalityConfig]]
    views: int  # M

    def __init__(self, config: Any) -> None: ...

    @property
    def config(self) -> Any: ...

    def cost(self, length: int) -> float:
        """What a sample of this length adds to batch.size, after cropping, in `unit`."""

    def crop(self, length: int) -> int:
        """Length after cropping; 0 when the sample is too short to be used."""

    def masked_tokens(self, length: int) -> int:
        """Masked tokens of a sample of this length (before cropping) over all M views."""

    def decode(self, sample: Mapping[str, bytes], rng: np.random.Generator | None) -> Any:
        """One example from the sample's tar members: decoded, cropped, augmented, normalised; whole
        and as it is when rng is None. Raises ValueError when it cannot be."""

    def collate(
        self, examples: Sequence[Any], rngs: Sequence[np.random.Generator], index: int
    ) -> Batch:
        """Pads the examples into one batch and draws the masks of each from its own generator."""

    def unmasked(self, examples: Sequence[Any]) -> Batch:
        """The examples as one batch of which the student sees everything (M = 1, N = 0)."""

    def baseline(self, example: Any) -> npt.NDArray[np.float32]:
        """Plain features of one example, to hold a probe's numbers against."""

    def warnings(self) -> list[str]:
        """Settings that are allowed but were seen to fail; printed before training."""

    def front_end(self, model: TransformerConfig) -> FrontEnd: ...

    def predictor(self, model: TransformerConfig) -> nn.Module:
        """forward(batch, encoder output [B * M, K, D]) -> predictions [N, D]."""

    def picture(self, batch: Batch) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
        """What to show of a batch: an image [rows, columns] and which tokens are masked [T]."""
