"""Which checkpoint is best, and when a run no longer improves.

scalars of a validation --Judge.score--> TrainState.score --> retention, RUN/checkpoints/best
                        --Judge.progress--> TrainState.best --> early stopping
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from d2v_ds.config import Config
from d2v_ds.errors import UserError
from d2v_ds.scores import ERROR_RATES
from d2v_ds.telemetry.metrics import VALID

LOWER_IS_BETTER = ("loss", *ERROR_RATES)


@dataclass(frozen=True)
class Judge:
    """name: the scalar that decides. lower: whether lower values are better. patience: validations
    without a better value after which a run ends; 0: never."""

    name: str
    lower: bool
    patience: int = 0

    @classmethod
    def of(cls, config: Config, metric: str) -> Judge:
        """metric: the scalar that decides unless save.best names another."""
        name = (config.save.best or metric).replace("valid/", VALID, 1)
        name = name if name.startswith(VALID) else VALID + name
        lower = name.removeprefix(VALID).partition("/")[0] in LOWER_IS_BETTER
        return cls(name, lower, config.finetune.patience)

    def score(self, scores: Mapping[str, float]) -> float | None:
        """The value that decides, negated if higher is better, so that lower scores are better.
        None without a validation. Raises UserError if it is not among the scalars."""
        if not scores:
            return None
        if self.name not in scores:
            known = ", ".join(name.removeprefix(VALID) for name in scores)
            raise UserError(
                f"save.best: the validation has no {self.name.removeprefix(VALID)!r} (it has: "
                f"{known})"
            )
        value = scores[self.name]
        if math.isnan(value):
            return sys.float_info.max  # JSON has no infinity
        return value if self.lower else -value

    def progress(self, best: Mapping[str, Any], step: int, score: float) -> dict[str, Any]:
        """The best validation so far, {step, score, since}; since: validations after it."""
        if not best or score < best["score"]:
            return {"step": step, "score": score, "since": 0}
        return {**best, "since": best["since"] + 1}

    def exhausted(self, best: Mapping[str, Any]) -> bool:
        """Whether the run should end."""
        return bool(self.patience and best and best["since"] >= self.patience)

    def describe(self, best: Mapping[str, Any]) -> str:
        value = best["score"] if self.lower else -best["score"]
        return f"{self.name.removeprefix(VALID)} {value:.4g} at step {best['step']}"
