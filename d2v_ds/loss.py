"""Regression targets out of teacher layers, and the regression loss: all in fp32, no parameters.

B samples, T tokens, N masked tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

EPS = 1e-5


def instance_norm(x: Tensor, valid: Tensor | None) -> Tensor:
    """Zero mean and unit variance over the tokens, for each sample and channel.

    x [B, T, D] fp32; valid [B, T] or None when every token exists: padding enters neither the
    statistics nor, being zeroed, the result. Biased variance, eps 1e-5 (data2vec.md section 4).
    """
    if valid is None:
        variance, mean = torch.var_mean(x, dim=1, keepdim=True, correction=0)
        return (x - mean) * torch.rsqrt(variance + EPS)
    weight = valid[:, :, None].to(x.dtype)
    count = weight.sum(1, keepdim=True).clamp(min=1)
    mean = (x * weight).sum(1, keepdim=True) / count
    centred = (x - mean) * weight
    variance = centred.square().sum(1, keepdim=True) / count
    return centred * torch.rsqrt(variance + EPS)


def normalise(x: Tensor, kind: str, valid: Tensor | None) -> Tensor:
    """x [B, T, D] fp32 by `kind`: instance (over tokens), layer (over channels) or none."""
    if kind == "instance":
        return instance_norm(x, valid)
    if kind == "layer":
        return F.layer_norm(x, x.shape[-1:], eps=EPS)
    return x


def make_targets(
    layers: Sequence[Tensor], valid: Tensor | None, *, layer_norm: str, final_norm: str
) -> Tensor:
    """Mean over the teacher's top layers, each normalised; then normalised again.

    layers: K tensors [B, T, D]; the result [B, T, D] is fp32 (data2vec.md section 4).
    """
    total = normalise(layers[0].float(), layer_norm, valid)
    for layer in layers[1:]:
        total = total + normalise(layer.float(), layer_norm, valid)
    return normalise(total / len(layers), final_norm, valid)


def regression_loss(
    prediction: Tensor, target: Tensor, *, beta: float, scale: float | None
) -> Tensor:
    """Sum over masked tokens of scale * sum over channels of the error, fp32, a scalar.

    prediction, target [N, D]. beta 0: squared error; above: smooth L1 with that beta. scale None:
    1 / sqrt(D) (data2vec.md section 5).
    """
    prediction, target = prediction.float(), target.float()
    if beta == 0:
        total = (prediction - target).square().sum()
    else:
        total = F.smooth_l1_loss(prediction, target, beta=beta, reduction="sum")
    return total * (prediction.shape[-1] ** -0.5 if scale is None else scale)
