"""The trunk: a stack of blocks on tokens, plain single-device torch.

    tokens [R, T, D], attention bias --Trunk--> output [R, T, D], outputs of the top layers

One class covers post-norm blocks (data2vec 2.0, and 1.0 for speech and text; fairseq
examples/data2vec/models) and pre-norm blocks with LayerScale, drop path and keys without a bias
(1.0 for vision; data2vec_vision beit/modeling_finetune.py).

R rows (samples, or views of samples), T tokens per row, D width, H heads, L layers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from d2v_ds.config.bounds import BelowOne, Bounds, Factor, Layers, OffAmount, Width


@dataclass(frozen=True)
class TransformerConfig:
    """The trunk that all modalities share."""

    dim: Width = 768
    """Width of a token. heads must divide it."""

    depth: Layers = 12
    """The number of blocks."""

    heads: Width = 12
    """Attention heads per block."""

    mlp_ratio: Annotated[float, Bounds(0, 1000, open_low=True)] = 4.0
    """Hidden width of the feed-forward network (FFN), as a multiple of dim."""

    norm: Literal["post", "pre"] = "post"
    """post: LayerNorm after each residual sum; pre: before each branch, and once after the last
    block."""

    norm_eps: Factor = 1e-5
    """Epsilon of LayerNorm in the blocks and directly before them."""

    qkv_bias: Literal["all", "qv"] = "all"
    """all: queries, keys and values have a bias; qv: keys have none, as in BEiT."""

    layer_scale: OffAmount = 0.0
    """Initial value of a learned factor per channel and branch (LayerScale); 0: no such factor."""

    dropout: BelowOne = 0.1
    """Dropout of the outputs of attention and FFN."""

    attention_dropout: BelowOne = 0.1
    """Dropout of the attention weights."""

    activation_dropout: BelowOne = 0.0
    """Dropout inside the FFN, after its activation."""

    drop_path: BelowOne = 0.0
    """Probability that a row skips a branch (stochastic depth) in the last block; it rises linearly
    from 0 in the first block."""

    layer_drop: BelowOne = 0.0
    """Probability that a micro-batch skips a block (LayerDrop)."""

    init: Literal["bert", "beit"] = "bert"
    """bert: weights from N(0, 0.02); beit: the same truncated at one standard deviation, with the
    last layer of each branch scaled down with depth."""

    checkpoint_activations: bool = False
    """Recompute the activations inside each block in the backward pass, which saves memory and
    costs time."""

    def __post_init__(self) -> None:
        if int(self.dim * self.mlp_ratio) < 1:
            raise ValueError(f"mlp_ratio={self.mlp_ratio} gives the FFN no width at dim={self.dim}")
        if self.dim % self.heads:
            raise ValueError(f"dim={self.dim} is not divisible by heads={self.heads}")


class Attention(nn.Module):
    """Multi-head self-attention with one fused projection. Rows of `qkv`: all queries, then all
    keys, then all values, each by head."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.dropout = config.attention_dropout
        self.qkv = nn.Linear(config.dim, 3 * config.dim, bias=config.qkv_bias == "all")
        self.q_bias = self.v_bias = None
        if config.qkv_bias == "qv":
            self.q_bias = nn.Parameter(torch.zeros(config.dim))
            self.v_bias = nn.Parameter(torch.zeros(config.dim))
        self.proj = nn.Linear(config.dim, config.dim)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [R, T, D], bias broadcastable to [R, H, T, T] or None -> [R, T, D]."""
        R, T, D = x.shape
        qkv = self.qkv(x).view(R, T, 3, D)
        if self.q_bias is not None and self.v_bias is not None:
            qkv = qkv + torch.stack([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        q, k, v = qkv.view(R, T, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)
        return self.proj(x.transpose(1, 2).reshape(R, T, D))  # type: ignore[no-any-return]


class FeedForward(nn.Module):
    """Linear layer, GELU, dropout, linear layer."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        hidden = int(config.dim * config.mlp_ratio)
        self.fc1 = nn.Linear(config.dim, hidden)
        self.dropout = nn.Dropout(config.activation_dropout)
        self.fc2 = nn.Linear(hidden, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        """[R, T, D] -> [R, T, D]."""
        return self.fc2(self.dropout(F.gelu(self.fc1(x))))  # type: ignore[no-any-return]


class Branch(nn.Module):
    """Dropout, LayerScale (Touvron et al. 2021) and drop path (stochastic depth by row, Huang et
    al. 2016) of a branch's output, before it is added to the residual."""

    def __init__(self, config: TransformerConfig, drop_path: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(config.dropout)
        self.drop_path = drop_path
        self.scale = None
        if config.layer_scale > 0:
            self.scale = nn.Parameter(torch.full((config.dim,), config.layer_scale))

    def forward(self, x: Tensor) -> Tensor:
        """[R, T, D] -> [R, T, D]."""
        x = self.dropout(x)
        if self.scale is not None:
            x = x * self.scale
        if self.training and self.drop_path > 0:
            kept = torch.rand(len(x), 1, 1, device=x.device) >= self.drop_path
            x = x * (kept / (1.0 - self.drop_path)).to(x.dtype)
        return x


class Block(nn.Module):
    """post: x = norm1(x + attention(x)); x = norm2(x + ffn(x)).
    pre: x = x + attention(norm1(x)); x = x + ffn(norm2(x))."""

    def __init__(self, config: TransformerConfig, drop_path: float) -> None:
        super().__init__()
        self.post = config.norm == "post"
        self.attention = Attention(config)
        self.norm1 = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.ffn = FeedForward(config)
        self.norm2 = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.branch1 = Branch(config, drop_path)
        self.branch2 = Branch(config, drop_path)

    def forward(self, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """x [R, T, D], bias broadcastable to [R, H, T, T] or None -> (the block's output, the FFN's
        output before dropout, residual and norm), both [R, T, D]."""
        if self.post:
            x = self.norm1(x + self.branch1(self.attention(x, bias)))
            ffn = self.ffn(x)
            return self.norm2(x + self.branch2(ffn)), ffn
        x = x + self.branch1(self.attention(self.norm1(x), bias))
        ffn = self.ffn(self.norm2(x))
        return x + self.branch2(ffn), ffn


class Trunk(nn.Module):
    """`depth` blocks, and a norm after pre-norm blocks. During training a block is dropped with
    probability `layer_drop`.

    A dropped block still runs, and its result is discarded. Under ZeRO 3 a skipped block would keep
    the gradient partitions of the previous step, which gives wrong updates. Because every block
    always runs, the draw may differ between micro-batches and between ranks.
    """

    def __init__(
        self,
        config: TransformerConfig,
        depth: int,
        *,
        layer_drop: float,
        final_norm: bool = True,
    ) -> None:
        super().__init__()
        self.layer_drop = layer_drop
        self.checkpoint_activations = config.checkpoint_activations
        self.blocks = nn.ModuleList(
            Block(config, config.drop_path * i / max(1, depth - 1)) for i in range(depth)
        )
        self.norm = None
        if config.norm == "pre" and final_norm:
            self.norm = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.apply(INITS[config.init])
        if config.init == "beit":
            scale_by_depth(self.blocks)

    def forward(
        self, x: Tensor, bias: Tensor | None, *, collect: int = 0
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """x [R, T, D], bias broadcastable to [R, H, T, T] or None -> the last block's output
        [R, T, D], normalised if blocks are pre-norm, and (FFN output, block output) of each of the
        top `collect` blocks, lowest first."""
        first = len(self.blocks) - collect
        layers: list[tuple[Tensor, Tensor]] = []
        for i, block in enumerate(self.blocks):
            if self.checkpoint_activations and torch.is_grad_enabled():
                y, ffn = checkpoint(block, x, bias, use_reentrant=False)
            else:
                y, ffn = block(x, bias)
            if self.training and self.layer_drop > 0:
                kept = torch.rand((), device=x.device) >= self.layer_drop
                y = torch.where(kept, y, x)
            x = y
            if i >= first:
                layers.append((ffn, x))
        return x if self.norm is None else self.norm(x), layers


# ------------------------------------------------------------------------------ attention biases


def alibi_slopes(heads: int) -> list[float]:
    """One slope per head: a geometric series if `heads` is a power of two, otherwise the series of
    the next lower power, then every second slope of the next higher one (Press et al. 2022; fairseq
    get_alibi)."""

    def geometric(n: int) -> list[float]:
        return [2.0 ** (-8.0 * (i + 1) / n) for i in range(n)]

    lower = 2 ** int(math.log2(heads))
    return geometric(lower) + geometric(2 * lower)[0::2][: heads - lower]


class Alibi(nn.Module):
    """Symmetric linear attention bias with one learned, non-negative scale per head, shared by all
    layers (fairseq examples/data2vec/models/modalities/base.py)."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        # Not a buffer, because a bf16 engine would round it. forward moves it to the device once.
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


class RelativeBias(nn.Module):
    """Learned attention bias per head and offset between two patches of a grid, shared by all
    layers. A leading class token adds three more: from it, to it, and to itself (BEiT, Bao et al.
    2022; data2vec_vision RelativePositionBias)."""

    def __init__(self, grid: tuple[int, int], heads: int) -> None:
        super().__init__()
        self.grid = grid
        h, w = grid
        self.table = nn.Parameter(torch.zeros((2 * h - 1) * (2 * w - 1) + 3, heads))

    def forward(self, positions: Tensor) -> Tensor:
        """Patch positions [R, T] int64, in row-major order -> bias [R, H, 1 + T, 1 + T]."""
        h, w = self.grid
        row, column = positions // w, positions % w
        rows = row[:, :, None] - row[:, None, :] + h - 1  # [R, T, T], from 0
        columns = column[:, :, None] - column[:, None, :] + w - 1
        last = len(self.table)
        index = F.pad(rows * (2 * w - 1) + columns, (1, 0, 1, 0), value=last - 1)
        index[:, 0, 1:] = last - 3
        index[:, 1:, 0] = last - 2
        return self.table[index].permute(0, 3, 1, 2)


# -------------------------------------------------------------------------------- initialisation


def bert_init(module: nn.Module) -> None:
    """Draws Linear and Embedding weights from N(0, 0.02) and zeroes biases and the padding row
    (fairseq init_bert_params). For nn.Module.apply."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
    if isinstance(module, nn.Embedding) and module.padding_idx is not None:
        with torch.no_grad():
            module.weight[module.padding_idx].zero_()


def beit_normal(tensor: Tensor) -> None:
    """Fills a tensor from N(0, 0.02), truncated at one standard deviation (data2vec_vision
    beit/modeling_cyclical.py)."""
    nn.init.trunc_normal_(tensor, std=0.02, a=-0.02, b=0.02)


def beit_init(module: nn.Module) -> None:
    """Draws Linear and Conv2d weights by `beit_normal` and zeroes biases. For nn.Module.apply."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        beit_normal(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def scale_by_depth(blocks: nn.ModuleList) -> None:
    """Scales the last layer of both branches of block n (from 1) by 1 / sqrt(2 n), as BEiT does."""
    with torch.no_grad():
        for i, block in enumerate(blocks):
            assert isinstance(block, Block)
            for linear in (block.attention.proj, block.ffn.fc2):
                linear.weight.div_(math.sqrt(2.0 * (i + 1)))


INITS = {"bert": bert_init, "beit": beit_init}
