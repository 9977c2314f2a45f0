"""The contract of a task: what the loop (train.py) trains, checkpoints and reports on.

    config --Task.resolve--> every default written out --Task.create--> Task
    batch --forward--> (loss, sums)      sums --Report.summarize--> scalars of metrics.jsonl

Pre-training (pretrain.py) is one task. A task without a teacher keeps the defaults of `teacher` and
`averages`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from d2v_ds.batch import Batch
from d2v_ds.config import Config
from d2v_ds.modalities.base import Modality

Sums = Mapping[str, npt.NDArray[np.float64]]


class Report(ABC):
    """Turns the sums of a task into scalars, a console line and warnings."""

    tags: ClassVar[Mapping[str, str]]
    """{name of a scalar: its TensorBoard tag}, for every name that `summarize` returns. A name X of
    a validation, also of Task.score, becomes valid_X, with the tag valid/X."""

    @abstractmethod
    def summarize(self, sums: Sums, steps: float) -> dict[str, float]:
        """Scalars from the sums of `steps` steps over all micro-batches and ranks. Not a whole
        number if the sums of some ranks were not finite and are left out."""

    @abstractmethod
    def line(self, row: Mapping[str, float]) -> str:
        """The scalars that the console shows."""

    def warnings(self, row: Mapping[str, float]) -> list[str]:
        """Warnings about a row, for the log."""
        return []


class Task(nn.Module, ABC):
    """A model with its objective; forward(batch, count) -> (loss, sums).

    Every parameter is either trained (requires_grad) or an average of a trained one.
    """

    modalities: Mapping[str, Modality]
    report: Report
    weights_prefix: ClassVar[str] = ""
    """The prefix of the parameters that `init` provides: encoder.*, predictors.*, head.*."""

    teacher: nn.Module | None
    """The frozen submodule, under this name, that holds the averages; None without a teacher."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = None

    @staticmethod
    def resolve(config: Config) -> Config:
        """The configuration with every default written out. Collective: all ranks must call it.
        Raises UserError."""
        return config

    @classmethod
    @abstractmethod
    def create(cls, config: Config) -> Task:
        """The task of a configuration, in fp32 on the CPU. Raises UserError."""

    @abstractmethod
    def forward(self, batch: Batch, count: int) -> tuple[Tensor, dict[str, Tensor]]:
        """This micro-batch's share of the step's loss, and sums for the report.

        count: the divisor of the step's loss, over all micro-batches and ranks
        (StepBatch.count). sums: fp32 tensors of a fixed shape, detached; they are added up over
        micro-batches, steps and ranks.
        """

    def part(self, name: str) -> str:
        """The modality that a parameter belongs to; "" for what every step trains. A step of one
        modality leaves the parts of the others untouched."""
        return ""

    def lr_scale(self, name: str) -> float:
        """The factor of the learning rate for a parameter."""
        return 1.0

    @property
    def metric(self) -> str:
        """The scalar of a validation that decides which checkpoint is best."""
        return "loss"

    def held_out(self, modality: str) -> Modality:
        """How samples of a modality are read for validation."""
        return self.modalities[modality]

    def outcomes(self, batch: Batch, sums: dict[str, Tensor]) -> list[Any]:
        """What `score` needs of each sample of a batch in evaluation mode, as small host objects.
        Removes the tensors that it uses from `sums`, which are not added up."""
        return []

    def score(self, outcomes: list[Any]) -> dict[str, float]:
        """The metrics of a validation, from the outcomes of all samples."""
        return {}

    def begin_step(self, step: int, modality: str) -> str:
        """Prepares for step number `step` (from 0) and returns the part that it trains, in addition
        to "". Must depend on its arguments alone, so that a resumed run continues exactly."""
        return modality

    def averages(self) -> dict[str, str]:
        """{parameter of the teacher: the trained parameter that it averages}, full names."""
        return {}
