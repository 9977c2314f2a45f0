"""The contract of a modality: one file each, known to the rest through the registry alone.

B samples, M masked views a sample, T tokens, K visible tokens, N masked tokens, D width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import numpy.typing as npt
from torch import nn

from d2v_ds.batch import Batch
from d2v_ds.student import DecoderConfig, FrontEnd
from d2v_ds.transformer import TransformerConfig


@dataclass(frozen=True)
class HeadConfig:
    """The predictor of data2vec 1.0."""

    layers: int = 1
    zero_last: bool = False  # begin with predictions of zero


@dataclass(frozen=True)
class ModalityConfig:
    """Settings that every modality has."""

    views: int = 8  # masked views of a sample for one pass of the teacher
    # 2.0 takes masked tokens out of the encoder's input, 1.0 puts a mask token in their place
    masked: Literal["removed", "replaced"] = "removed"
    # parts of the front end that the teacher takes from the student instead of averaging its own
    shared: tuple[str, ...] = ()
    prenet_depth: int = 0  # blocks of the modality's own in front of the trunk
    prenet_dropout: float = 0.0  # after the norm in front of them
    prenet_layer_drop: float = 0.0
    decoder: DecoderConfig = field(default_factory=DecoderConfig)  # where tokens are removed
    head: HeadConfig = field(default_factory=HeadConfig)  # where they are replaced
    loss_beta: float = 0.0  # 0: squared error; above: smooth L1
    loss_scale: float | None = None  # per channel; null: 1 / sqrt(width)
    loss_weight: float = 1.0  # against other modalities' gradients; the loss is shown without it
    padded_statistics: bool = False  # as fairseq: only attention knows what is padding, target
    # statistics and convolutions count it in

    def __post_init__(self) -> None:
        if self.views < 1:
            raise ValueError(f"views={self.views} must be at least 1")
        if self.loss_beta < 0:
            raise ValueError(f"loss_beta={self.loss_beta} must be 0 or more")
        if not 0 < self.loss_weight < math.inf:
            raise ValueError(f"loss_weight={self.loss_weight} must be above 0")
        for name in self.shared:
            if name not in SHAREABLE:
                raise ValueError(f"shared: no part {name!r} (allowed: {', '.join(SHAREABLE)})")


SHAREABLE = ("features", "positions", "context")


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

    def check_set(self, about: Mapping[str, Any]) -> None:
        """Raises UserError when a shard set, whose index.json says `about`, does not fit the
        settings."""

    def cost(self, length: int) -> float:
        """What a sample of this length adds to batch.size, after cropping, in `unit`."""

    def crop(self, length: int) -> int:
        """Length after cropping; 0 when the sample is too short to be used."""

    def masked_tokens(self, length: int) -> int | None:
        """Masked tokens of a sample of this length (before cropping) over all M views; None where
        masks of one length differ in them, for all lengths alike."""

    def decode(self, sample: Mapping[str, bytes], rng: np.random.Generator | None) -> Any:
        """One example from the sample's tar members: decoded, cropped, augmented; whole
        and as it is when rng is None. Raises ValueError when it cannot be."""

    def fit(self, example: Any, length: int) -> Any:
        """The example in the size of one that `decode` makes of a sample of this length: cut, or
        repeated; the very same object where it has that size."""

    def collate(
        self, examples: Sequence[Any], rngs: Sequence[np.random.Generator], index: int
    ) -> Batch:
        """Pads the examples into one batch and draws the masks of each from its own generator."""

    def unmasked(self, examples: Sequence[Any]) -> Batch:
        """The examples as one batch of which the student sees everything (M = 1, N = 0)."""

    def largest(self) -> Any:
        """An example as large as any that decode gives, without content: to measure memory."""

    def baseline(self, example: Any) -> npt.NDArray[np.float32]:
        """Plain features of one example, to hold a probe's numbers against."""

    def warnings(self) -> list[str]:
        """Settings that are allowed but were seen to fail; printed before training."""

    def front_end(self, model: TransformerConfig) -> FrontEnd: ...

    def predictor(self, model: TransformerConfig) -> nn.Module:
        """forward(batch, encoder output [B * M, K, D]) -> predictions [N, D]."""

    def class_weight(self, views: int) -> float:
        """Weight of the loss of the last extra token in a micro-batch of so many views, against
        that of a masked token; 0 where there is none."""

    def picture(self, batch: Batch) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
        """What to show of a batch's first view: an image [across, up] and what is masked, [T] over
        its width or [t, u] over both."""
