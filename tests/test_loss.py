"""Targets and losses compared with plain numpy in double precision. test_pretrain.py tests them in
the task, test_golden.py against the original code."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from d2v_ds.loss import EPS, class_loss, make_targets, normalise, regression_loss

Array = npt.NDArray[np.float64]
LENGTHS = (7, 4, 1)  # tokens of each sample
B, T, D = len(LENGTHS), max(LENGTHS), 6
NORMS = ["instance", "layer", "none"]


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator) * 3 + 1


def valid() -> Tensor:
    return torch.arange(T)[None] < torch.tensor(LENGTHS)[:, None]


def plain_norm(x: Array, kind: str) -> Array:
    """One sample [T, D] without padding."""
    if kind == "none":
        return x
    axis = 0 if kind == "instance" else 1
    mean, variance = x.mean(axis, keepdims=True), x.var(axis, keepdims=True)
    return np.asarray((x - mean) / np.sqrt(variance + EPS))


def plain_targets(layers: list[Tensor], layer_norm: str, final_norm: str) -> list[Array]:
    """The targets of each sample, [T_b, D]."""
    return [
        plain_norm(
            np.mean([plain_norm(x[b, :n].double().numpy(), layer_norm) for x in layers], axis=0),
            final_norm,
        )
        for b, n in enumerate(LENGTHS)
    ]


def close(ours: Tensor, expected: Any) -> None:
    np.testing.assert_allclose(ours.double().numpy(), expected, rtol=2e-5, atol=2e-5)


# ---------------------------------------------------------------------------------------- targets


@pytest.mark.parametrize("final_norm", NORMS)
@pytest.mark.parametrize("layer_norm", NORMS)
def test_targets_with_padding(layer_norm: str, final_norm: str) -> None:
    layers = [random(B, T, D, seed=i) for i in range(3)]
    targets = make_targets(layers, valid(), layer_norm=layer_norm, final_norm=final_norm)
    assert targets.dtype == torch.float32
    for b, expected in enumerate(plain_targets(layers, layer_norm, final_norm)):
        close(targets[b, : LENGTHS[b]], expected)


@pytest.mark.parametrize("layer_norm", NORMS)
def test_without_padding_a_mask_of_all_tokens_changes_nothing(layer_norm: str) -> None:
    layers = [random(2, T, D, seed=i) for i in range(2)]
    settings = {"layer_norm": layer_norm, "final_norm": "instance"}
    everything = torch.ones(2, T, dtype=torch.bool)
    ours, masked = (make_targets(layers, v, **settings) for v in (None, everything))
    torch.testing.assert_close(ours, masked, rtol=1e-5, atol=1e-5)


def test_the_content_of_padding_does_not_count() -> None:
    layer, exists = random(B, T, D), valid()
    other = torch.where(exists[:, :, None], layer, layer + 100)
    for kind in NORMS:
        a, b = normalise(layer, kind, exists), normalise(other, kind, exists)
        assert torch.equal(a[exists], b[exists])


def test_targets_of_half_precision_layers_are_computed_in_fp32() -> None:
    layers = [random(B, T, D, seed=i).bfloat16() for i in range(4)]
    targets = make_targets(layers, None, layer_norm="layer", final_norm="none")
    whole = make_targets([x.float() for x in layers], None, layer_norm="layer", final_norm="none")
    assert targets.dtype == torch.float32 and torch.equal(targets, whole)


# ----------------------------------------------------------------------------------------- losses


@pytest.mark.parametrize("scale", [None, 1.0, 0.25])
@pytest.mark.parametrize("beta", [0.0, 0.5, 4.0])
def test_regression_loss(beta: float, scale: float | None) -> None:
    prediction, target = random(11, D), random(11, D, seed=1)
    error = np.abs(prediction.double().numpy() - target.double().numpy())
    if beta == 0:
        each = error**2
    else:
        each = np.where(error < beta, error**2 / (2 * beta), error - beta / 2)
    expected = each.sum() * (D**-0.5 if scale is None else scale)
    loss = regression_loss(prediction, target, beta=beta, scale=scale)
    assert loss.shape == () and loss.dtype == torch.float32
    close(loss / expected, 1.0)


def test_regression_loss_is_fp32_and_zero_without_tokens() -> None:
    prediction, target = random(5, D).bfloat16(), random(5, D, seed=1)
    loss = regression_loss(prediction, target, beta=0.0, scale=1.0)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, (prediction.float() - target).square().sum())
    nothing = torch.zeros(0, D, requires_grad=True)
    loss = regression_loss(nothing, torch.zeros(0, D), beta=0.0, scale=None)
    loss.backward()
    assert loss == 0 and nothing.grad is not None


@pytest.mark.parametrize("views", [1, 3])
@pytest.mark.parametrize("padded", [False, True])
def test_class_loss(views: int, padded: bool) -> None:
    prediction, targets = random(B * views, D), random(B, T, D, seed=1)
    masked = torch.arange(B * views).float()  # a different number in each view, 0 in the first
    expected = 0.0
    for row in range(B * views):
        tokens = targets[row // views, : LENGTHS[row // views] if padded else T]
        error = prediction[row].double() - tokens.double().mean(0)
        expected += float(masked[row] * error.square().sum() / D**0.5)
    loss = class_loss(prediction, targets, valid() if padded else None, masked)
    assert loss.shape == () and loss.dtype == torch.float32
    close(loss / expected, 1.0)


def test_class_loss_does_not_depend_on_how_samples_are_batched() -> None:
    prediction, targets, exists = random(2 * B, D), random(B, T, D, seed=1), valid()
    masked = torch.arange(2 * B).float()
    whole = class_loss(prediction, targets, exists, masked)
    parts = [
        class_loss(
            prediction[2 * b : 2 * b + 2], targets[b : b + 1, :n], None, masked[2 * b : 2 * b + 2]
        )
        for b, n in enumerate(LENGTHS)
    ]
    torch.testing.assert_close(whole, torch.stack(parts).sum())
