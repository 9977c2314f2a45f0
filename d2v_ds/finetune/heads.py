"""The layers on top of a fine-tuned encoder.

B samples, T tokens, D width, C outputs.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

STD = 0.02
NORM_EPS = 1e-6


class CtcHead(nn.Module):
    """Tokens [B, T, D] -> logits [B, T, C] (fairseq wav2vec2_asr.py)."""

    def __init__(self, dim: int, outputs: int, *, std: float | None, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.proj = last_layer(dim, outputs, std)

    def forward(self, x: Tensor, valid: Tensor | None) -> Tensor:
        return self.proj(self.dropout(x))  # type: ignore[no-any-return]


class MeanHead(nn.Module):
    """Tokens [B, T, D] -> mean over those that exist -> LayerNorm -> logits [B, C] (BEiT; fairseq
    mae_image_classification.py)."""

    def __init__(self, dim: int, outputs: int, *, std: float | None, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.dropout = nn.Dropout(dropout)
        self.proj = last_layer(dim, outputs, STD if std is None else std)

    def forward(self, x: Tensor, valid: Tensor | None) -> Tensor:
        return self.proj(self.dropout(self.norm(mean(x, valid))))  # type: ignore[no-any-return]


class FirstHead(nn.Module):
    """Tokens [B, T, D] -> the first -> linear layer, tanh -> logits [B, C] (the classification head
    of RoBERTa, Liu et al. 2019)."""

    def __init__(self, dim: int, outputs: int, *, std: float | None, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.dense = last_layer(dim, dim, STD)
        self.proj = last_layer(dim, outputs, STD if std is None else std)

    def forward(self, x: Tensor, valid: Tensor | None) -> Tensor:
        x = torch.tanh(self.dense(self.dropout(x[:, 0])))
        return self.proj(self.dropout(x))  # type: ignore[no-any-return]


HEADS = {"ctc": CtcHead, "mean": MeanHead, "first": FirstHead}
HeadKind = Literal["ctc", "mean", "first"]


def last_layer(inputs: int, outputs: int, std: float | None) -> nn.Linear:
    """Weights from N(0, std), truncated at two standard deviations, or Xavier-uniform; no bias."""
    layer = nn.Linear(inputs, outputs)
    nn.init.zeros_(layer.bias)
    if std is None:
        nn.init.xavier_uniform_(layer.weight)
    else:
        nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
    return layer


def mean(x: Tensor, valid: Tensor | None) -> Tensor:
    """The mean over the tokens that exist: [B, T, D], valid [B, T] -> [B, D]."""
    if valid is None:
        return x.mean(1)
    weight = valid[:, :, None].to(x.dtype)
    return (x * weight).sum(1) / weight.sum(1)
