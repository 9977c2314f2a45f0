"""One optimizer step, used by the training loop, the benchmarks and the tests.

micro-batches --forward, backward--> summed gradients --optimizer--> masters --EMA--> teacher
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from d2v_ds.batch import StepBatch
from d2v_ds.config import Config, EngineSettings, Optim
from d2v_ds.engine import Engine, create_engine
from d2v_ds.engine.optimizer import param_groups
from d2v_ds.schedules import learning_rate, teacher_decay
from d2v_ds.seeding import seed_torch
from d2v_ds.task import Task
from d2v_ds.teacher import Ema


@dataclass(frozen=True)
class StepSettings:
    """The values of the schedules for one step: pure functions of its number."""

    step: int  # applied steps before this one
    lr: float
    weight_decay: float
    ema_decay: float  # of the update after this step

    @staticmethod
    def of(config: Config, step: int) -> StepSettings:
        return StepSettings(
            step=step,
            lr=learning_rate(config.optim, config.run.steps, step),
            weight_decay=config.optim.weight_decay,
            ema_decay=teacher_decay(config.teacher, step + 1),
        )


class Observer:
    """Receives timings and sums during a step. This base class ignores them."""

    def timed(self, part: str) -> AbstractContextManager[None]:
        """Around each part of a step: forward, backward, optimizer, ema."""
        return nullcontext()

    def add(self, modality: str, sums: Mapping[str, Tensor]) -> None:
        """The sums of one micro-batch."""


def train_step(
    engine: Engine,
    ema: Ema | None,
    step_batch: StepBatch,
    settings: StepSettings,
    *,
    seed: int,
    active: str = "",
    observer: Observer | None = None,
) -> bool:
    """Takes one optimizer step. Collective: all ranks must call it. ema: None for a task without a
    teacher. active: the part that the step trains (Task.begin_step); "": the batch's modality.

    Returns True if parameters changed. If a gradient is not finite on any rank, parameters, moments
    and teacher stay unchanged on all ranks.
    """
    observer = observer or Observer()
    # Each micro-batch's loss is its share of the step's, so gradients are summed, not averaged.
    for batch in step_batch.micro_batches:
        seed_torch(seed, settings.step, batch.index)
        with observer.timed("forward"):
            loss, sums = engine(batch.to(engine.device), step_batch.count)
        with observer.timed("backward"):
            engine.backward(loss)
        observer.add(step_batch.modality, sums)

    active = active or step_batch.modality
    with observer.timed("optimizer"):
        taken = engine.step(settings.lr, settings.weight_decay, active)

    # The teacher follows the student's fp32 masters.
    if taken and ema is not None:
        with observer.timed("ema"):
            ema.update(settings.ema_decay, active)
    return taken


def create_engine_and_ema(
    task: Task,
    *,
    settings: EngineSettings,
    optim: Optim,
    accumulation: int,
    device: torch.device,
    overrides: Mapping[str, Any] | None = None,
) -> tuple[Engine, Ema | None]:
    """The engine around the task, and the EMA for its teacher. The arguments are those of
    `create_engine`."""
    averages = task.averages()
    engine = create_engine(
        task,
        param_groups(
            task,
            task.part,
            set(averages.values()).__contains__,
            decay_all=optim.decay_all,
            lr_scale=task.lr_scale,
        ),
        settings=settings,
        optim=optim,
        accumulation=accumulation,
        device=device,
        overrides=overrides,
    )
    if task.teacher is None:
        return engine, None
    return engine, Ema(engine, task.teacher, averages, "teacher.")
