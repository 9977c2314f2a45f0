"""The pre-training report: sums compared with plain numpy, and how it shows collapse."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from d2v_ds.pretrain_report import PretrainReport, effective_rank
from d2v_ds.telemetry.metrics import Accumulator

D = 6


def stats(
    prediction: Tensor, target: Tensor, samples: int = 2, placed: Tensor | None = None
) -> dict[str, Tensor]:
    """The fp32 sums that the model reports for one micro-batch. prediction, target: [N, D]. placed:
    targets of B samples at P positions [B, P, D]; default: N samples at one position."""
    error = (prediction - target).pow(2).sum()
    placed = target[:, None] if placed is None else placed
    return {
        "loss": error / 1000,
        "masked": torch.tensor(float(len(target))),
        "tokens": torch.tensor(2.0 * len(target)),
        "error": error,
        "target_sum": target.sum(0),
        "target_sq": target.pow(2).sum(0),
        "prediction_sum": prediction.sum(0),
        "prediction_sq": prediction.pow(2).sum(0),
        "front_std": torch.tensor(0.25 * samples),
        "samples": torch.tensor(float(samples)),
        "sampled": torch.tensor(float(len(target))),
        "sampled_sum": target.sum(0),
        "sampled_products": target.T @ target,
        "placed": torch.full((placed.shape[1],), float(len(placed))),
        "placed_sum": placed.sum(0),
        "placed_sq": placed.pow(2).sum(0),
    }


def spread(values: np.ndarray) -> float:
    return float(np.sqrt(values.var(axis=0, ddof=1) + 1e-6).mean())


def written_out_rank(vectors: np.ndarray) -> float:
    """The effective rank of vectors [N, D], from the singular values."""
    squares = np.linalg.svd(vectors - vectors.mean(0), compute_uv=False) ** 2
    entropy = 0.0
    for square in squares:
        share = square / squares.sum()
        entropy -= share * math.log(share) if share > 0 else 0.0
    return math.exp(entropy)


def test_summary_equals_numpy_on_all_vectors() -> None:
    torch.manual_seed(0)
    accumulator = Accumulator()
    predictions, targets = [], []
    for count in (5, 1, 40, 13):
        target = torch.randn(count, D) * torch.arange(1, D + 1)
        prediction = 0.7 * target + 0.1 * torch.randn(count, D)
        accumulator.add(stats(prediction, target))
        predictions.append(prediction.numpy().astype(np.float64))
        targets.append(target.numpy().astype(np.float64))
    p, y = np.concatenate(predictions), np.concatenate(targets)
    summary = PretrainReport().summarize(accumulator.reduce(), steps=2)
    error = ((p - y) ** 2).sum()
    expected = {
        "loss": error / 1000 / 2,
        "target_spread": spread(y),
        "prediction_spread": spread(p),
        "target_sample_spread": spread(y),
        "front_end_spread": 0.25,
        "explained_share": 1 - error / ((y - y.mean(0)) ** 2).sum(),
        "masked_share": 0.5,
    }
    rank = written_out_rank(y)
    assert summary.pop("target_rank") == pytest.approx(rank, rel=1e-4)  # eigenvalues are in fp32
    assert summary == pytest.approx(expected, rel=1e-6)
    assert {*summary, "target_rank"} <= set(PretrainReport.tags)
    assert accumulator.reduce() == {}


@pytest.mark.parametrize(("mean", "tolerance"), [(0.0, 1e-6), (3.0, 1e-5), (30.0, 1e-3)])
def test_spread_of_a_million_tokens_away_from_zero(mean: float, tolerance: float) -> None:
    torch.manual_seed(1)
    accumulator, seen = Accumulator(), []
    plain: dict[str, Tensor] = {}  # totals in fp32, for comparison
    for _ in range(250):
        target = mean + 0.1 * torch.randn(4000, D)
        reported = stats(target, target)
        accumulator.add(reported)
        plain = {name: plain.get(name, 0) + value for name, value in reported.items()}
        seen.append(target.numpy())
    expected = spread(np.concatenate(seen).astype(np.float64))
    summary = PretrainReport().summarize(accumulator.reduce())
    assert summary["target_spread"] == pytest.approx(expected, rel=tolerance)
    assert summary["explained_share"] == 1
    if mean == 30:
        lost = PretrainReport().summarize({name: value.numpy() for name, value in plain.items()})
        assert lost["target_spread"] != pytest.approx(expected, rel=0.01)


def test_a_collapsed_target_has_almost_no_spread() -> None:
    accumulator = Accumulator()
    constant = torch.full((100, D), 0.3)
    accumulator.add(stats(constant, constant))
    assert PretrainReport().summarize(accumulator.reduce())["target_spread"] == pytest.approx(
        1e-3, rel=1e-2
    )


def test_targets_that_depend_only_on_the_position_have_no_spread_between_samples() -> None:
    """Their total spread and explained share look like those of a good run."""
    torch.manual_seed(0)
    places = torch.randn(8, D)
    accumulator = Accumulator()
    for _ in range(5):  # micro-batches of one sample
        collapsed = places + 0.01 * torch.randn(8, D)
        accumulator.add(stats(0.9 * collapsed, collapsed, placed=collapsed[None]))
    summary = PretrainReport().summarize(accumulator.reduce())
    assert summary["target_spread"] > 0.5 and summary["explained_share"] > 0.9
    assert summary["target_sample_spread"] == pytest.approx(0.01, rel=0.3)


def test_a_single_sample_has_no_spread_between_samples() -> None:
    accumulator = Accumulator()
    target = torch.randn(4, D)
    accumulator.add(stats(target, target, placed=target[None]))
    assert math.isnan(PretrainReport().summarize(accumulator.reduce())["target_sample_spread"])


def test_effective_rank() -> None:
    rng = np.random.default_rng(0)
    for rank in (1, 3, D):
        vectors = rng.standard_normal((5000, rank)) @ np.eye(rank, D) + 4.0
        found = effective_rank(vectors.T @ vectors, vectors.sum(0), len(vectors))
        assert found == pytest.approx(rank, rel=1e-2)
    nothing = np.zeros((D, D))
    assert math.isnan(effective_rank(nothing, nothing[0], 10))
    assert math.isnan(effective_rank(nothing, nothing[0], 1))
    assert math.isnan(effective_rank(nothing * math.nan, nothing[0], 10))


def test_metrics_without_masked_tokens_are_nan() -> None:
    accumulator = Accumulator()
    accumulator.add(stats(torch.zeros(0, D), torch.zeros(0, D)))
    summary = PretrainReport().summarize(accumulator.reduce())
    assert summary["front_end_spread"] == 0.25 and summary["loss"] == 0
    for name in ("target_spread", "prediction_spread", "explained_share", "masked_share"):
        assert math.isnan(summary[name]), name
