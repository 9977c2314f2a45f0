"""The trunk: a stack of blocks on tokens, plain single-device torch.

Tokens and an additive attention bias go in; the last block's output comes out, with what the
regression targets need of the top layers. Post-norm blocks as in data2vec 2.0 (data2vec.md 1.4).

R rows (samples, or views of samples), T tokens of a row, D width, H heads, L layers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class TransformerConfig:
    """`model.*`: the sizes of the trunk."""

    dim: int = 768
    depth: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0
    norm_eps: float = 1e-5
    dropout: float = 0.1  # of the attention's output and of the FFN's
    attention_dropout: float = 0.1
    activation_dropout: float = 0.0
    layer_drop: float = 0.0

    def __post_init__(self) -> None:
        if self.dim % self.heads:
            raise ValueError(f"dim={self.dim} is not divisible by heads={self.heads}")
        for name in ("dropout", "attention_dropout", "activation_dropout", "layer_drop"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} does not lie in [0, 1)")


class Attention(nn.Module):
    """Multi-head self-attention with one fused projection (rows of `qkv`: all queries, keys,
    values; heads within each)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.dropout = config.attention_dropout
        self.qkv = nn.Linear(config.dim, 3 * config.dim)
        self.proj = nn.Linear(config.dim, config.dim)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [R, T, D], bias broadcastable to [R, H, T, T] or None -> [R, T, D]."""
        R, T, D = x.shape
        q, k, v = self.qkv(x).view(R, T, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)
        return self.proj(x.transpose(1, 2).reshape(R, T, D))  # type: ignore[no-any-return]


class FeedForward(nn.Module):
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        hidden = int(config.dim * config.mlp_ratio)
        self.fc1 = nn.Linear(config.dim, hidden)
        self.dropout = nn.Dropout(config.activation_dropout)
        self.fc2 = nn.Linear(hidden, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        """[R, T, D] -> [R, T, D]."""
        return self.fc2(self.dropout(F.gelu(self.fc1(x))))  # type: ignore[no-any-return]


class Block(nn.Module):
    """x = norm1(x + attention(x)); x = norm2(x + ffn(x))."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.norm1 = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.ffn = FeedForward(config)
        self.norm2 = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """[R, T, D] -> the block's output and its FFN's output before dropout, residual and norm
        (the layer's contribution to the targets), both [R, T, D]."""
        x = self.norm1(x + self.dropout(self.attention(x, bias)))
        ffn = self.ffn(x)
        return self.norm2(x + self.dropout(ffn)), ffn


class Trunk(nn.Module):
    """`depth` blocks. In training a block is dropped with probability `layer_drop`.

    A dropped block runs and its result is not used: a block skipped under ZeRO 3 would leave last
    step's gradient partitions in place (wrong updates), and with one path the draw may differ
    between micro-batches and needs no agreement between ranks.
    """

    def __init__(self, config: TransformerConfig, depth: int, *, layer_drop: float) -> None:
        super().__init__()
        self.layer_drop = layer_drop
        self.blocks = nn.ModuleList(Block(config) for _ in range(depth))
        self.apply(bert_init)

    def forward(
        self, x: Tensor, bias: Tensor | None, *, collect: int = 0
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """x [R, T, D], bias broadcastable to [R, H, T, T] -> the last block's output [R, T, D] and,
        of each of the top `collect` blocks, (FFN output, block output), lowest first."""
        first = len(self.blocks) - collect
        layers: list[tuple[Tensor, Tensor]] = []
        for i, block in enumerate(self.blocks):
            y, ffn = block(x, bias)
            if self.training and self.layer_drop > 0:
                kept = torch.rand((), device=x.device) >= self.layer_drop
                y = torch.where(kept, y, x)
            x = y
            if i >= first:
                layers.append((ffn, x))
        return x, layers


def alibi_slopes(heads: int) -> list[float]:
    """One slope a head, geometric for a power of two; else the next lower power's slopes, then
    every second of the next higher's (Press et al., 2022; data2vec.md 1.4)."""

    def geometric(n: int) -> list[float]:
        return [2.0 ** (-8.0 * (i + 1) / n) for i in range(n)]

    lower = 2 ** int(math.log2(heads))
    return geometric(lower) + geometric(2 * lower)[0::2][: heads - lower]


class Alibi(nn.Module):
    """Symmetric linear attention bias with one learned, non-negative scale a head, shared by all
    layers (data2vec.md 1.4)."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        # Not a buffer, for a bf16 engine would round it; forward takes it to the device, once.
        self._slopes = torch.tensor(alibi_slopes(heads))  # [H]
        self.scale = nn.Parameter(torch.ones(heads))

    def forward(self, positions: Tensor) -> Tensor:
        """Token positions [R, T] int64 -> bias [R, H, T, T] in the scale's dtype."""
        distance = (positions[:, :, None] - positions[:, None, :]).abs()  # [R, T, T]
        if self._slopes.device != positions.device:
            self._slopes = self._slopes.to(positions.device)
        bias = -self._slopes[:, None, None] * distance[:, None]  # [R, H, T, T]
        scale = self.scale.clamp(min=0).float()
        return (bias * scale[:, None, None]).to(self.scale.dtype)


def bert_init(module: nn.Module) -> None:
    """Linear and Embedding weights N(0, 0.02), biases 0 (data2vec.md 1.4); for nn.Module.apply."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
