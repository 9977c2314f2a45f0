"""A fourth modality, added as a user of the package would add one: sensor readings, with `STRIDE`
readings per token.

B samples, S readings, T tokens, D width. Run as a program (python -m tests.helpers.sensor), this
module is the command `d2v-ds` with the modality and its recipe registered. Inside the package,
each registration would take one line.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from d2v_ds import recipes
from d2v_ds.batch import Batch, mask_indices
from d2v_ds.data.headers import HeaderReader, Length
from d2v_ds.data.tar_scan import Member
from d2v_ds.masking import block_count, block_mask_1d
from d2v_ds.modalities import REGISTRY
from d2v_ds.modalities.base import Modality, ModalityConfig, extra_tokens
from d2v_ds.recipes.speech import speech_tiny
from d2v_ds.student import Context, ConvDecoder, FrontEnd
from d2v_ds.transformer import TransformerConfig

STRIDE = 4
Readings = npt.NDArray[np.float32]  # [S]


@dataclass(frozen=True)
class SensorConfig(ModalityConfig):
    """`modality.series.*`."""

    views: int = 2
    crop: int = 200
    """Longer series are cropped to this number of readings."""
    least: int = 8
    """Shorter series are left out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.crop < self.least:
            raise ValueError(f"crop={self.crop} is below least={self.least}")


class SensorFeatures(nn.Module):
    """[B, S] -> tokens [B, T, D] with learned positions."""

    def __init__(self, config: SensorConfig, dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(STRIDE, dim)
        self.positions = nn.Embedding(config.crop // STRIDE, dim)

    def forward(self, inputs: Tensor) -> Tensor:
        T = inputs.shape[1] // STRIDE
        x = inputs[:, : T * STRIDE].view(len(inputs), T, STRIDE) / 10_000 - 1.5
        positions = torch.arange(T, device=inputs.device)
        tokens: Tensor = self.proj(x.to(self.proj.weight.dtype)) + self.positions(positions)
        return tokens


def read_header(file: BinaryIO, member: Member) -> Length:
    """The length of a .series member: half its size, because it contains raw int16 readings."""
    if member.size % 2 or not member.size:
        raise ValueError(f".series: has {member.size} bytes, expected 2 for each reading")
    return Length(member.size // 2)


class Sensor(Modality):
    name: ClassVar[str] = "series"
    batch_unit: ClassVar[str] = "numbers"
    length_unit: ClassVar[str] = "numbers"
    extensions: ClassVar[tuple[str, ...]] = ("series", "array")
    header_readers: ClassVar[dict[str, HeaderReader]] = {"series": read_header}
    baseline_name: ClassVar[str] = "mean and spread"
    Config: ClassVar[type[ModalityConfig]] = SensorConfig
    config: SensorConfig

    @classmethod
    def check_sample(cls, members: Mapping[str, bytes], about: Mapping[str, Any]) -> int:
        return len(cls._readings(members))

    @classmethod
    def _readings(cls, sample: Mapping[str, bytes]) -> npt.NDArray[np.int16]:
        data = next(sample[key] for key in cls.extensions if key in sample)
        readings = np.frombuffer(data, "<i2")
        if (readings < 0).any():
            raise ValueError("has negative numbers")
        return readings

    def crop(self, length: int) -> int:
        return 0 if length < self.config.least else min(length, self.config.crop)

    def cost(self, length: int) -> float:
        return float(self.crop(length))

    def masked_tokens(self, length: int) -> int | None:
        return self.views * block_count(self.crop(length) // STRIDE, prob=0.5, inverse=False)

    def decode(self, sample: Mapping[str, bytes], rng: np.random.Generator | None) -> Readings:
        readings, rng = self._readings(sample), rng or np.random.default_rng(0)
        size = self.crop(len(readings))
        start = int(rng.integers(len(readings) - size + 1))
        cropped: Readings = readings[start : start + size].astype(np.float32)
        return cropped

    def fit(self, example: Readings, length: int) -> Readings:
        size = self.crop(length)
        return example if len(example) == size else np.resize(example, size)

    def collate(
        self, examples: Sequence[Readings], rngs: Sequence[np.random.Generator], index: int
    ) -> Batch:
        masks = [
            block_mask_1d(
                len(example) // STRIDE,
                prob=0.5,
                length=3,
                adjust=0.05,
                inverse=False,
                views=self.views,
                rng=rng,
            )
            for example, rng in zip(examples, rngs, strict=True)
        ]
        fields: dict[str, Any] = mask_indices(masks)
        return Batch(
            modality=self.name, index=index, inputs=pad(examples), views=self.views, **fields
        )

    def unmasked(self, examples: Sequence[Readings]) -> Batch:
        nothing = [np.zeros((1, len(e) // STRIDE), dtype=bool) for e in examples]
        fields: dict[str, Any] = mask_indices(nothing)
        return Batch(modality=self.name, index=0, inputs=pad(examples), views=1, **fields)

    def largest(self) -> Readings:
        return np.zeros(self.config.crop, dtype=np.float32)

    def baseline(self, example: Readings) -> npt.NDArray[np.float32]:
        return np.array([example.mean(), example.std()], dtype=np.float32)

    def front_end(self, model: TransformerConfig) -> FrontEnd:
        return FrontEnd(
            features=SensorFeatures(self.config, model.dim),
            extra=extra_tokens(self.config, model.dim),
            context=Context(model, depth=0, dropout=0.0, layer_drop=0.0),
        )

    def predictor(self, model: TransformerConfig) -> nn.Module:
        return ConvDecoder(self.config.decoder, model.dim)

    def picture(self, batch: Batch) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
        T = int(batch.seen[0].numel() if batch.valid is None else batch.valid[0].sum())
        readings = batch.inputs[0, : T * STRIDE].numpy().astype(np.float32)
        return np.repeat(readings[:, None], 8, axis=1), ~batch.seen[0, :T].numpy()


def pad(examples: Sequence[Readings]) -> Tensor:
    inputs = torch.zeros(len(examples), max(map(len, examples)))
    for row, example in zip(inputs, examples, strict=True):
        row[: len(example)] = torch.from_numpy(example)
    return inputs


def series_tiny() -> dict[str, Any]:
    """data2vec 2.0 on sensor readings."""
    raw = speech_tiny()
    decoder = raw["modality"]["speech"]["decoder"] | {"dim": 32, "groups": 4}
    raw["modality"] = {"series": {"decoder": decoder}}
    raw["model"] |= {"dim": 32, "depth": 2}
    raw["target"]["top_k"] = 2
    raw["batch"]["size"] = 1600.0
    return raw


if __name__ == "__main__":
    from d2v_ds.cli import main

    REGISTRY["series"] = "tests.helpers.sensor:Sensor"
    recipes.RECIPES["series_tiny"] = series_tiny
    sys.exit(main())
