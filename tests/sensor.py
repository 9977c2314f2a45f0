"""A fourth modality, as somebody would add one: readings of a sensor, `STRIDE` of them a token.

B samples, S readings, T tokens, D width. Run as a program it is the command `d2v-ds` with this
modality and its recipe registered, which inside the package would be a line each.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from series import STRIDE, Series, SeriesModality
from torch import Tensor, nn

from d2v_ds import recipes
from d2v_ds.batch import Batch, mask_indices
from d2v_ds.modalities import REGISTRY
from d2v_ds.modalities.base import ModalityConfig
from d2v_ds.recipes.speech import speech_tiny
from d2v_ds.student import Context, ConvDecoder, FrontEnd
from d2v_ds.transformer import TransformerConfig


@dataclass(frozen=True)
class SensorConfig(ModalityConfig):
    """`modality.series.*`."""

    views: int = 2
    crop: int = 200  # readings
    least: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.crop < self.least:
            raise ValueError(f"crop={self.crop} is below least={self.least}")


class Readings(nn.Module):
    """[B, S] -> tokens [B, T, D] with learned positions."""

    def __init__(self, config: SensorConfig, dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(STRIDE, dim)
        self.positions = nn.Embedding(config.crop // STRIDE, dim)

    def forward(self, inputs: Tensor) -> Tensor:
        T = inputs.shape[1] // STRIDE
        x = inputs[:, : T * STRIDE].view(len(inputs), T, STRIDE) / 10_000 - 1.5
        places = torch.arange(T, device=inputs.device)
        tokens: Tensor = self.proj(x.to(self.proj.weight.dtype)) + self.positions(places)
        return tokens


class Sensor(SeriesModality):
    baseline_name: ClassVar[str] = "mean and spread"
    Config: ClassVar[type[ModalityConfig]] = SensorConfig

    def __init__(self, config: SensorConfig) -> None:
        super().__init__(config.crop, config.least)
        self.config = config
        self.views = config.views

    def check_set(self, about: Mapping[str, Any]) -> None:
        """Any set of series will do."""

    def decode(self, sample: Mapping[str, bytes], rng: np.random.Generator | None) -> Series:
        return super().decode(sample, rng or np.random.default_rng(0))

    def unmasked(self, examples: Sequence[Series]) -> Batch:
        nothing = [np.zeros((1, len(e) // STRIDE), dtype=bool) for e in examples]
        inputs = torch.zeros(len(examples), max(map(len, examples)))
        for row, example in zip(inputs, examples, strict=True):
            row[: len(example)] = torch.from_numpy(example)
        fields: dict[str, Any] = mask_indices(nothing)
        return Batch(modality=self.name, index=0, inputs=inputs, views=1, **fields)

    def largest(self) -> Series:
        return np.zeros(self.config.crop, dtype=np.float32)

    def baseline(self, example: Series) -> npt.NDArray[np.float32]:
        return np.array([example.mean(), example.std()], dtype=np.float32)

    def warnings(self) -> list[str]:
        return []

    def front_end(self, model: TransformerConfig) -> FrontEnd:
        return FrontEnd(
            features=Readings(self.config, model.dim),
            context=Context(model, depth=0, dropout=0.0, layer_drop=0.0),
        )

    def predictor(self, model: TransformerConfig) -> nn.Module:
        return ConvDecoder(self.config.decoder, model.dim)

    def class_weight(self, views: int) -> float:
        return 0.0

    def picture(self, batch: Batch) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
        T = int(batch.seen[0].numel() if batch.valid is None else batch.valid[0].sum())
        readings = batch.inputs[0, : T * STRIDE].numpy().astype(np.float32)
        return np.repeat(readings[:, None], 8, axis=1), ~batch.seen[0, :T].numpy()


def series_tiny() -> dict[str, Any]:
    """data2vec 2.0 on readings of a sensor."""
    raw = speech_tiny()
    decoder = raw["modality"]["speech"]["decoder"] | {"dim": 32, "groups": 4}
    raw["modality"] = {"series": {"decoder": decoder}}
    raw["model"] |= {"dim": 32, "depth": 2}
    raw["target"]["top_k"] = 2
    raw["batch"]["size"] = 1600.0
    return raw


if __name__ == "__main__":
    import sensor  # by its own name, under which loader workers import it

    from d2v_ds.cli import main

    REGISTRY["series"] = sensor.Sensor
    recipes.RECIPES["series_tiny"] = series_tiny
    sys.exit(main())
