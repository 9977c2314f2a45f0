"""A task without a teacher that predicts the mean of a sensor's readings.

Run as a program, it uses the package's training loop: python -m tests.helpers.regress key=value
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from d2v_ds.batch import Batch
from d2v_ds.config import Config
from d2v_ds.config.decoding import apply_overrides, decode
from d2v_ds.distributed.world import World
from d2v_ds.task import Report, Sums, Task
from d2v_ds.train import train
from tests.helpers.sensor import STRIDE, Sensor, SensorConfig

BIASED = 0.01


class RegressReport(Report):
    tags: ClassVar[dict[str, str]] = {"loss": "loss/total", "bias": "repr/bias"}

    def summarize(self, sums: Sums, steps: int) -> dict[str, float]:
        return {
            "loss": float(sums["loss"]) / steps,
            "bias": float(sums["error"] / sums["samples"]),
        }

    def line(self, row: Mapping[str, float]) -> str:
        return f"loss {row['loss']:.4f}"

    def warnings(self, row: Mapping[str, float]) -> list[str]:
        return ["the prediction is biased"] if abs(row["bias"]) > BIASED else []


class Regress(Task):
    """A small MLP per token, averaged; squared error against the mean of the readings."""

    def __init__(self, modality: Sensor) -> None:
        super().__init__()
        self.modalities = {modality.name: modality}
        self.report = RegressReport()
        self.head = nn.Sequential(nn.Linear(STRIDE, 16), nn.GELU(), nn.Linear(16, 1))

    @classmethod
    def create(cls, config: Config) -> Regress:
        return cls(Sensor(decode(SensorConfig, config.modality["series"], "modality.series")))

    def forward(self, batch: Batch, count: int) -> tuple[Tensor, dict[str, Tensor]]:
        weight = self.head[0].weight
        B, T = len(batch.inputs), batch.inputs.shape[1] // STRIDE
        x = (batch.inputs / 30_000).to(weight.dtype)[:, : T * STRIDE].view(B, T, STRIDE)
        exists = torch.ones(B, T, device=x.device) if batch.valid is None else batch.valid.float()
        number = exists.sum(1)
        predicted = (self.head(x)[:, :, 0].float() * exists).sum(1) / number  # [B]
        target = (x.float().mean(2) * exists).sum(1) / number
        error = predicted - target
        loss = F.mse_loss(predicted, target, reduction="sum") / count
        return loss, {
            "loss": loss.detach(),
            "error": error.detach().sum(),
            "samples": torch.full((), float(B), device=x.device),
        }


def settings() -> dict[str, Any]:
    return {
        "run": {"steps": 8},
        "batch": {"size": 1600.0, "micro_batches": 2},
        "data": {"workers": 0},
        "modality": {"series": {"views": 1}},
        "optim": {"lr": 0.01, "warmup_steps": 0, "schedule": "constant"},
        "log": {"every": 1, "pictures_every": 4},
        "save": {"every": 4},
    }


if __name__ == "__main__":
    config = decode(Config, apply_overrides(settings(), sys.argv[1:]))
    sys.exit(train(Regress, config, World.from_environment()))
