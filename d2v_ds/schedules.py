"""Schedules: pure functions of the step, nothing to save and nothing to restore.

lr(n) belongs to the optimizer step number n, counted from 0; ema_decay(n) is the one applied after
n optimizer steps, so n >= 1 (data2vec.md 3.2 and 6.2; fairseq's schedulers at 3d262bb).
"""

from __future__ import annotations

import math

TRI_STAGE_INIT = 0.01  # of the peak; fairseq init_lr_scale, final_lr_scale
TRI_STAGE_FINAL = 0.01


def cosine(n: int, peak: float, warmup: int, steps: int) -> float:
    """Linear from 0 to `peak` over `warmup` steps, then half a cosine to 0 at `steps`; 0 after."""
    if n < warmup:
        return peak * n / warmup
    progress = min(1.0, (n - warmup) / max(1, steps - warmup))
    return 0.5 * peak * (1.0 + math.cos(math.pi * progress))


def tri_stage(n: int, peak: float, warmup: int, steps: int, decay_share: float = 0.07) -> float:
    """Linear from 1 % of `peak`, hold, then exponential decay to 1 % over the last `decay_share`.

    Warm-up, hold and decay meet at whole steps as in fairseq (tri_stage_lr_scheduler.py).
    """
    decay = int(steps * decay_share)
    hold = steps - warmup - decay
    if n < warmup:
        return peak * (TRI_STAGE_INIT + (1.0 - TRI_STAGE_INIT) * n / warmup)
    if n < warmup + hold:
        return peak
    passed = min(n - warmup - hold, decay)
    return peak * math.exp(math.log(TRI_STAGE_FINAL) * passed / max(1, decay))


def constant(n: int, peak: float, warmup: int, steps: int) -> float:
    """Linear from 0 to `peak` over `warmup` steps, then flat."""
    return peak * n / warmup if n < warmup else peak


LEARNING_RATES = {"cosine": cosine, "tri_stage": tri_stage, "constant": constant}


def ema_decay(n: int, start: float, end: float, anneal_steps: int) -> float:
    """Linear from `start` to `end` over `anneal_steps` updates, then `end`."""
    if n >= anneal_steps:
        return end
    return end - (end - start) * (1.0 - n / anneal_steps)
