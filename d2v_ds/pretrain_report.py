"""The metrics of pre-training: the loss, and whether representations are healthy.

    tensors of a micro-batch --measure--> sums on the device --PretrainReport.summarize--> scalars

The loss of a self-distilled model is not informative: it rises while the model learns, and
collapsed runs reach the lowest losses. Each row therefore also contains the spread of the targets,
the predictions and the front-end output, and the fraction of the targets that is explained.

B samples, T tokens, N masked tokens, D width, P positions in time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from d2v_ds.batch import Batch
from d2v_ds.task import Report, Sums

SAMPLED = 1024  # maximum number of targets per micro-batch for the effective rank
POSITIONS = 8  # in time, at which the targets of different samples are compared
VARIANCE_EPS = 1e-6  # fairseq, compute_var

Array = npt.NDArray[np.float64]


@torch.no_grad()
def measure(
    batch: Batch,
    *,
    tokens: Tensor,
    all_targets: Tensor,
    targets: Tensor,
    predictions: Tensor,
    loss: Tensor,
) -> dict[str, Tensor]:
    """Sums over one micro-batch, fp32 on the device, without host synchronisation.

    tokens [B, T, D] are the front end's output, all_targets [B, T, D] those of all tokens; targets
    and predictions [N, D] are those of the masked tokens. The result holds scalars; [D] sums of
    targets and predictions and of their squares; [D, D] products of some targets; and [P, D] sums
    over samples of the targets at P positions.
    """
    predictions = predictions.float()
    N, B = targets.shape[0], tokens.shape[0]
    sampled = targets[:: max(1, -(-N // SAMPLED))]
    positions = (torch.arange(POSITIONS, device=all_targets.device) * 2 + 1) * all_targets.shape[1]
    positions = positions // (2 * POSITIONS)
    placed = all_targets.index_select(1, positions)  # [B, P, D]
    exists = torch.ones_like(placed[:, :, :1])
    if batch.valid is not None:
        exists = batch.valid.index_select(1, positions)[:, :, None].float()
        placed = placed * exists
    return {
        "loss": loss,
        "masked": count(N, loss),
        "tokens": count(batch.seen.numel(), loss)
        if batch.valid is None
        else batch.valid.sum().float() * batch.views,
        "error": (predictions - targets).square().sum(),
        "target_sum": targets.sum(0),
        "target_sq": targets.square().sum(0),
        "prediction_sum": predictions.sum(0),
        "prediction_sq": predictions.square().sum(0),
        "front_std": spread_over_time(tokens.float(), batch.valid).sum(),
        "samples": count(B, loss),
        "sampled": count(len(sampled), loss),
        "sampled_sum": sampled.sum(0),
        "sampled_products": sampled.T @ sampled,
        "placed": exists[:, :, 0].sum(0),
        "placed_sum": placed.sum(0),
        "placed_sq": placed.square().sum(0),
    }


def count(n: int, like: Tensor) -> Tensor:
    """n as a tensor on the device, without a copy from the host."""
    return torch.full((), float(n), dtype=torch.float32, device=like.device)


def spread_over_time(tokens: Tensor, valid: Tensor | None) -> Tensor:
    """Standard deviation over the tokens, averaged over channels: [B, T, D] -> [B]. Close to 0 when
    the front end has collapsed, which the spread of the targets does not show."""
    if valid is None:
        return tokens.std(1, correction=0).mean(-1)
    weight = valid[:, :, None].float()
    number = weight.sum(1, keepdim=True)
    mean = (tokens * weight).sum(1, keepdim=True) / number
    variance = ((tokens - mean).square() * weight).sum(1) / number[:, 0]
    return variance.sqrt().mean(-1)


class PretrainReport(Report):
    """The scalars of pre-training."""

    tags: ClassVar[dict[str, str]] = {
        "loss": "loss/total",
        "target_spread": "repr/std_target",
        "prediction_spread": "repr/std_prediction",
        "target_sample_spread": "repr/std_target_samples",
        "target_rank": "repr/rank_target",
        "front_end_spread": "repr/std_front_end_time",
        "explained_share": "repr/explained_share",
        "masked_share": "mask/share",
    }

    # A spread below which runs were seen to collapse, and what it means. The spread of all targets
    # and their rank stay high in such runs, and nearly everything is explained.
    collapse: ClassVar[dict[str, tuple[float, str]]] = {
        "front_end_spread": (0.1, "the output of the front end hardly changes over time"),
        "target_sample_spread": (
            0.2,
            "at each position the targets of all samples are nearly the same",
        ),
    }

    def summarize(self, sums: Sums, steps: float = 1) -> dict[str, float]:
        """Scalars from the sums (`measure`) of `steps` optimizer steps; NaN if there is no data.

        Spreads are fairseq's `target_var` and `pred_var`: mean_d sqrt(var_d + 1e-6), unbiased. The
        sample spread is that of different samples' targets at the same position; it falls to 0 if
        the targets encode only positions. explained_share: 1 - error / sum |y - mean|^2.
        target_rank: the effective rank (Roy and Vetterli 2007) of the targets' covariance.
        """
        count = float(sums["masked"])
        target = _squared_deviations(sums["target_sum"], sums["target_sq"], count)
        prediction = _squared_deviations(sums["prediction_sum"], sums["prediction_sq"], count)
        of_samples = [
            _spread(_squared_deviations(total, squares, float(number)), float(number))
            for number, total, squares in zip(
                sums["placed"], sums["placed_sum"], sums["placed_sq"], strict=True
            )
        ]
        return {
            "loss": float(sums["loss"]) / steps,
            "target_spread": _spread(target, count),
            "prediction_spread": _spread(prediction, count),
            "target_sample_spread": float(np.mean(of_samples)),
            "target_rank": effective_rank(
                sums["sampled_products"], sums["sampled_sum"], float(sums["sampled"])
            ),
            "front_end_spread": _ratio(float(sums["front_std"]), float(sums["samples"])),
            "explained_share": 1.0 - _ratio(float(sums["error"]), float(target.sum())),
            "masked_share": _ratio(count, float(sums["tokens"])),
        }

    def line(self, row: Mapping[str, float]) -> str:
        return (
            f"loss {row['loss']:.3f}, target spread {row['target_spread']:.2f}, "
            f"explained {row['explained_share']:.2f}, front-end spread "
            f"{row['front_end_spread']:.2f}"
        )

    def warnings(self, row: Mapping[str, float]) -> list[str]:
        return [
            f"{meaning} ({name} {row[name]:.3f}). Runs that stay below {least:.1f} have collapsed: "
            "lower optim.lr, warm up longer, or train on longer samples"
            for name, (least, meaning) in self.collapse.items()
            if row[name] < least
        ]


def effective_rank(
    products: npt.NDArray[np.float64], total: npt.NDArray[np.float64], count: float
) -> float:
    """exp of the entropy of the covariance's eigenvalues, normalised to a sum of 1: 1 for vectors
    on a line, D for equal spread in all directions. products [D, D]: sum of y y^T, total [D]."""
    if count < 2:
        return math.nan
    covariance = products / count - np.outer(total, total) / count**2
    if not np.isfinite(covariance).all():
        return math.nan
    spectrum = np.maximum(np.linalg.eigvalsh(covariance.astype(np.float32)), 0.0)
    shares = spectrum[spectrum > 0] / spectrum.sum(dtype=np.float64)
    return float(np.exp(-(shares * np.log(shares)).sum())) if len(shares) else math.nan


def _squared_deviations(
    total: npt.NDArray[np.float64], squares: npt.NDArray[np.float64], count: float
) -> npt.NDArray[np.float64]:
    """[D]: sum over the tokens of (y - mean)^2. Rounding can make it slightly negative."""
    return np.maximum(squares - total**2 / max(count, 1.0), 0.0)


def _spread(deviations: npt.NDArray[np.float64], count: float) -> float:
    if count < 2:
        return math.nan
    return float(np.sqrt(deviations / (count - 1) + VARIANCE_EPS).mean())


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan
