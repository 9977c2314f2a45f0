"""Optimizer steps for tests: wrappers of the package's `train_step` that return the losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from d2v_ds.batch import Batch, StepBatch
from d2v_ds.config import EngineSettings, Optim
from d2v_ds.engine import Engine
from d2v_ds.step import Observer, StepSettings, create_engine_and_ema, train_step
from d2v_ds.task import Task
from d2v_ds.teacher import Ema

CPU = torch.device("cpu")


class Losses(Observer):
    """The loss of each micro-batch of this rank, in order."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def add(self, modality: str, sums: Mapping[str, Tensor]) -> None:
        self.values.append(float(sums["loss"]))


def prepare(
    task: Task,
    optim: Optim,
    *,
    stage: str = "local",
    precision: str = "fp32",
    accumulation: int = 1,
    zero: Mapping[str, Any] | None = None,
    device: torch.device = CPU,
) -> tuple[Engine, Ema]:
    """The engine and the EMA of a task. zero: DeepSpeed's zero_optimization settings, merged over
    the stage's file."""
    engine, ema = create_engine_and_ema(
        task,
        settings=EngineSettings(config=stage, precision=precision),  # type: ignore[arg-type]
        optim=optim,
        accumulation=accumulation,
        device=device,
        overrides=None if stage == "local" or zero is None else {"zero_optimization": zero},
    )
    assert ema is not None, "the task has no teacher"
    return engine, ema


def step_batch(batches: Sequence[Any], count: int, **more: Any) -> StepBatch:
    """Micro-batches as the loader returns them, with `count` masked tokens in the whole step."""
    fields = {"samples": len(batches), "units": 1.0, "cursor": {}, **more}
    return StepBatch(
        modality=batches[0].modality, micro_batches=list(batches), count=count, **fields
    )


def take(
    engine: Engine,
    ema: Ema | None,
    batches: Sequence[Any],
    *,
    count: int,
    step: int = 0,
    lr: float = 1e-3,
    weight_decay: float = 0.01,
    decay: float = 0.9,
    must: bool = True,
) -> list[float]:
    """Trains one step on this rank's micro-batches and returns their losses. must: fails if the
    step is skipped."""
    losses = Losses()
    settings = StepSettings(step=step, lr=lr, weight_decay=weight_decay, ema_decay=decay)
    taken = train_step(engine, ema, step_batch(batches, count), settings, seed=0, observer=losses)
    assert taken or not must, f"step {step} was skipped"
    return losses.values


def masked_tokens(batches: Sequence[Batch]) -> int:
    return sum(len(batch.masked) for batch in batches)
