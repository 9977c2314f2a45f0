"""Regression targets from the teacher's layers, the regression loss and the class loss. All in
fp32, without parameters.

B samples, M masked views per sample, R = B * M rows, T tokens, N masked tokens, D width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

EPS = 1e-5


def instance_norm(x: Tensor, valid: Tensor | None) -> Tensor:
    """Normalises to zero mean and unit variance over the tokens, per sample and channel.

    x [B, T, D] fp32; valid [B, T], or None if every token exists. Padding does not enter the
    statistics and is zero in the result. Biased variance, eps 1e-5 (F.instance_norm and
    F.layer_norm in fairseq examples/data2vec/models/data2vec2.py).
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
    """Normalises x [B, T, D] fp32 by `kind`: instance (over tokens), layer (over channels) or
    none."""
    if kind == "instance":
        return instance_norm(x, valid)
    if kind == "layer":
        return F.layer_norm(x, x.shape[-1:], eps=EPS)
    return x


def make_targets(
    layers: Sequence[Tensor], valid: Tensor | None, *, layer_norm: str, final_norm: str
) -> Tensor:
    """The targets [B, T, D] in fp32: the mean over the teacher's top layers, each normalised by
    layer_norm, then normalised by final_norm (Baevski et al. 2022, section 3.3).

    layers: tensors [B, T, D]; valid [B, T], or None if every token exists.
    """
    total = normalise(layers[0].float(), layer_norm, valid)
    for layer in layers[1:]:
        total = total + normalise(layer.float(), layer_norm, valid)
    return normalise(total / len(layers), final_norm, valid)


def regression_loss(
    prediction: Tensor, target: Tensor, *, beta: float, scale: float | None
) -> Tensor:
    """The error summed over channels and masked tokens, times scale: a scalar in fp32.

    prediction, target [N, D]. beta 0: squared error; above 0: smooth L1 with this beta. scale None:
    1 / sqrt(D) (fairseq data2vec2.py, d2v_loss).
    """
    prediction, target = prediction.float(), target.float()
    if beta == 0:
        total = (prediction - target).square().sum()
    else:
        total = F.smooth_l1_loss(prediction, target, beta=beta, reduction="sum")
    return total * (prediction.shape[-1] ** -0.5 if scale is None else scale)


def class_loss(prediction: Tensor, targets: Tensor, valid: Tensor | None, masked: Tensor) -> Tensor:
    """The squared error of the class token's output against the mean of its sample's targets, times
    1 / sqrt(D) and the number of masked tokens of the view, summed over views: a scalar in fp32.

    prediction [R, D]; targets [B, T, D]; valid [B, T], or None if every token exists; masked [R],
    the number of masked tokens per view. After division by the masked tokens of the whole step, it
    is a mean over all views, weighted by masked tokens, and does not depend on the split into
    micro-batches (fairseq data2vec2.py, cls_loss, uses a different weight).
    """
    if valid is None:
        mean = targets.mean(1)
    else:
        weight = valid[:, :, None].to(targets.dtype)
        mean = (targets * weight).sum(1) / weight.sum(1)
    views = len(prediction) // len(mean)
    error = prediction.float() - mean.repeat_interleave(views, dim=0)  # [R, D]
    total: Tensor = (error.square().sum(1) * masked).sum()
    return total / math.sqrt(error.shape[1])
