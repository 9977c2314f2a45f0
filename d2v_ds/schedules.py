"""Schedules: pure functions of the step, so that no state has to be saved.

A learning rate belongs to optimizer step n, counted from 0. ema_decay(n) is applied after n
optimizer steps, so n >= 1 (fairseq/optim/lr_scheduler and get_annealed_rate, at 3d262bb).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from d2v_ds.config import Optim, TeacherSettings

TRI_STAGE_INIT = 0.01  # of the peak; fairseq init_lr_scale, final_lr_scale
TRI_STAGE_FINAL = 0.01


def cosine(n: int, peak: float, warmup: int, steps: int, end: float = 0.0) -> float:
    """Linear from 0 to `peak` over `warmup` steps, then half a cosine to `end` at `steps`, and
    constant afterwards (fairseq's cosine begins another period)."""
    if n < warmup:
        return peak * n / warmup
    progress = min(1.0, (n - warmup) / max(1, steps - warmup))
    return end + 0.5 * (peak - end) * (1.0 + math.cos(math.pi * progress))


def cosine_beit(n: int, peak: float, warmup: int, steps: int, end: float = 0.0) -> float:
    """As `cosine`, but the last step of the warm-up and the step after it both have the peak
    (data2vec_vision beit/utils.py, cosine_scheduler)."""
    if n < warmup:
        return peak * n / max(1, warmup - 1)
    return cosine(n, peak, warmup, steps, end)


def linear(n: int, peak: float, warmup: int, steps: int, end: float = 0.0) -> float:
    """Linear from 0 to `peak` over `warmup` steps, then linear to `end` at `steps` (fairseq
    polynomial_decay_schedule.py with power 1)."""
    if n < warmup:
        return peak * n / warmup
    return peak + (end - peak) * min(1.0, (n - warmup) / max(1, steps - warmup))


DECAY_SHARE = 0.07  # of the steps; fairseq phase_ratio [0.03, 0.9, 0.07]


def tri_stage(
    n: int,
    peak: float,
    warmup: int,
    steps: int,
    end: float = 0.0,
    *,
    hold: int | None = None,
    decay: int | None = None,
    final: float = TRI_STAGE_FINAL,
) -> float:
    """Linear from 1 % of `peak`, constant for `hold` steps, then exponential decay to `final` times
    `peak` over `decay` steps, and constant afterwards; `end` is ignored.

    decay: None for the last 7 % of the steps. hold: None for the steps that are left. The stages
    begin at whole steps, as in fairseq (tri_stage_lr_scheduler.py).
    """
    decay = int(steps * DECAY_SHARE) if decay is None else decay
    hold = max(0, steps - warmup - decay) if hold is None else hold
    if n < warmup:
        return peak * (TRI_STAGE_INIT + (1.0 - TRI_STAGE_INIT) * n / warmup)
    if n < warmup + hold:
        return peak
    passed = min(n - warmup - hold, decay)
    return peak * math.exp(math.log(final) * passed / max(1, decay))


def constant(n: int, peak: float, warmup: int, steps: int, end: float = 0.0) -> float:
    """Linear from 0 to `peak` over `warmup` steps, then constant; `end` is ignored."""
    return peak * n / warmup if n < warmup else peak


LEARNING_RATES: dict[str, Callable[..., float]] = {
    "cosine": cosine,
    "linear": linear,
    "tri_stage": tri_stage,
    "constant": constant,
    "cosine_beit": cosine_beit,
}


def ema_decay(n: int, start: float, end: float, anneal_steps: int) -> float:
    """Linear from `start` to `end` over `anneal_steps` updates, then `end`."""
    if n >= anneal_steps:
        return end
    return end - (end - start) * (1.0 - n / anneal_steps)


# --------------------------------------------------------------------------- of a configuration


def learning_rate(optim: Optim, steps: int, n: int) -> float:
    """The learning rate of optimizer step n (from 0) of a run of `steps` steps."""
    stages: dict[str, Any] = {}
    if optim.schedule == "tri_stage":
        stages = {"hold": optim.hold_steps, "decay": optim.decay_steps, "final": optim.decay_to}
    rate = LEARNING_RATES[optim.schedule]
    return rate(n, optim.lr, optim.warmup_steps, steps, optim.lr_end, **stages)


def teacher_decay(teacher: TeacherSettings, n: int) -> float:
    """The EMA decay of the update after optimizer step number n (from 1)."""
    return ema_decay(n, teacher.decay, teacher.decay_end, teacher.anneal_steps)
