"""The layers of a data2vec encoder: trunk, attention biases and front ends.

    inputs --FrontEnd--> tokens [B, E + T, D], attention bias --Trunk--> [B, E + T, D]

B samples, T tokens, E extra tokens in front of them, D width, H heads.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Settings = dict[str, Any]


# ------------------------------------------------------------------------------------------ trunk


class Attention(nn.Module):
    """Multi-head self-attention. Rows of `qkv`: all queries, then all keys, then all values."""

    def __init__(self, model: Settings) -> None:
        super().__init__()
        D = model["dim"]
        self.heads, self.dropout = model["heads"], model["attention_dropout"]
        self.qkv = nn.Linear(D, 3 * D, bias=model["qkv_bias"] == "all")
        self.q_bias = self.v_bias = None
        if model["qkv_bias"] == "qv":
            self.q_bias, self.v_bias = nn.Parameter(torch.zeros(D)), nn.Parameter(torch.zeros(D))
        self.proj = nn.Linear(D, D)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        B, T, D = x.shape
        qkv = self.qkv(x)
        if self.q_bias is not None and self.v_bias is not None:
            qkv = qkv + torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        q, k, v = qkv.view(B, T, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)
        return self.proj(x.transpose(1, 2).reshape(B, T, D))


class FeedForward(nn.Module):
    def __init__(self, model: Settings) -> None:
        super().__init__()
        hidden = int(model["dim"] * model["mlp_ratio"])
        self.fc1 = nn.Linear(model["dim"], hidden)
        self.dropout = nn.Dropout(model["activation_dropout"])
        self.fc2 = nn.Linear(hidden, model["dim"])

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.dropout(F.gelu(self.fc1(x))))


class Branch(nn.Module):
    """Dropout, LayerScale and drop path of a branch, before it is added to the residual."""

    def __init__(self, model: Settings, drop_path: float) -> None:
        super().__init__()
        self.dropout, self.drop_path = nn.Dropout(model["dropout"]), drop_path
        scale = model["layer_scale"]
        self.scale = nn.Parameter(torch.full((model["dim"],), scale)) if scale > 0 else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(x)
        if self.scale is not None:
            x = x * self.scale
        if self.training and self.drop_path > 0:
            kept = torch.rand(len(x), 1, 1, device=x.device) >= self.drop_path
            x = x * (kept / (1.0 - self.drop_path)).to(x.dtype)
        return x


class Block(nn.Module):
    def __init__(self, model: Settings, drop_path: float) -> None:
        super().__init__()
        D, eps = model["dim"], model["norm_eps"]
        self.post = model["norm"] == "post"
        self.attention, self.ffn = Attention(model), FeedForward(model)
        self.norm1, self.norm2 = nn.LayerNorm(D, eps=eps), nn.LayerNorm(D, eps=eps)
        self.branch1, self.branch2 = Branch(model, drop_path), Branch(model, drop_path)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if self.post:
            x = self.norm1(x + self.branch1(self.attention(x, bias)))
            return self.norm2(x + self.branch2(self.ffn(x)))
        x = x + self.branch1(self.attention(self.norm1(x), bias))
        return x + self.branch2(self.ffn(self.norm2(x)))


class Trunk(nn.Module):
    """Blocks, and a norm after pre-norm blocks. In training a block is dropped with probability
    `layer_drop`."""

    def __init__(self, model: Settings, depth: int, layer_drop: float, final_norm: bool) -> None:
        super().__init__()
        self.layer_drop = layer_drop
        rates = [model["drop_path"] * i / max(1, depth - 1) for i in range(depth)]
        self.blocks = nn.ModuleList(Block(model, rate) for rate in rates)
        self.norm = None
        if model["norm"] == "pre" and final_norm:
            self.norm = nn.LayerNorm(model["dim"], eps=model["norm_eps"])

    def forward(self, x: Tensor, bias: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The output, and the input of the first block and the output of every block."""
        states = [x]
        for block in self.blocks:
            if not (self.training and torch.rand(()).item() < self.layer_drop):
                x = block(x, bias)
            states.append(x)
        return x if self.norm is None else self.norm(x), tuple(states)


# -------------------------------------------------------------------------------- attention biases


def alibi_slopes(heads: int) -> list[float]:
    """One slope per head: a geometric series if `heads` is a power of two, otherwise the series of
    the next lower power, then every second slope of the next higher one."""

    def series(n: int) -> list[float]:
        return [2.0 ** (-8.0 * (i + 1) / n) for i in range(n)]

    lower = 2 ** int(math.log2(heads))
    return series(lower) + series(2 * lower)[0::2][: heads - lower]


class Alibi(nn.Module):
    """Symmetric linear bias with one learned scale per head."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.slopes = alibi_slopes(heads)
        self.scale = nn.Parameter(torch.ones(heads))

    def forward(self, T: int) -> Tensor:
        """[1, H, T, T]."""
        at = torch.arange(T, device=self.scale.device)
        slopes = torch.tensor(self.slopes, device=at.device)[:, None, None]
        scale = self.scale.clamp(min=0).float()[:, None, None]
        bias = -slopes * (at[:, None] - at).abs() * scale
        return bias[None].to(self.scale.dtype)


class RelativeBias(nn.Module):
    """Learned bias per head and offset between two patches, with three more entries for the class
    token: from it, to it, and to itself (BEiT)."""

    def __init__(self, side: int, heads: int) -> None:
        super().__init__()
        self.side = side
        self.table = nn.Parameter(torch.zeros((2 * side - 1) ** 2 + 3, heads))

    def forward(self, T: int) -> Tensor:
        """[1, H, 1 + T, 1 + T]."""
        at = torch.arange(T, device=self.table.device)
        row, column = at // self.side, at % self.side
        rows = row[:, None] - row + self.side - 1
        columns = column[:, None] - column + self.side - 1
        last = len(self.table)
        index = F.pad(rows * (2 * self.side - 1) + columns, (1, 0, 1, 0), value=last - 1)
        index[0, 1:], index[1:, 0] = last - 3, last - 2
        return self.table[index].permute(2, 0, 1)[None]


# -------------------------------------------------------------------------------------- front ends


class SpeechFeatures(nn.Module):
    """Waveforms [B, S] -> tokens [B, T, D]."""

    def __init__(self, settings: Settings, D: int) -> None:
        super().__init__()
        convs = settings["convs"]
        widths = [1, *(width for width, _, _ in convs)]
        self.convs = nn.ModuleList(
            nn.Conv1d(a, b, kernel, stride, bias=False)
            for a, (b, kernel, stride) in zip(widths, convs, strict=False)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in widths[1:])
        self.norm = nn.LayerNorm(widths[-1])
        self.proj = nn.Linear(widths[-1], D)

    def forward(self, waveforms: Tensor) -> Tensor:
        x = waveforms[:, None].to(self.proj.weight.dtype)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.gelu(norm(conv(x).transpose(1, 2)).transpose(1, 2).contiguous())
        return self.proj(self.norm(x.transpose(1, 2)))


class ConvPositions(nn.Module):
    """Relative positions of speech: grouped convolutions, each with LayerNorm and GELU."""

    def __init__(self, settings: Settings, D: int) -> None:
        super().__init__()
        kernel, groups = settings["kernel"], settings["groups"]
        self.convs = nn.ModuleList(
            nn.Conv1d(D, D, kernel, padding=kernel // 2, groups=groups)
            for _ in range(settings["depth"])
        )

    def forward(self, x: Tensor, exists: Tensor | None) -> Tensor:
        T = x.shape[1]
        for conv in self.convs:
            x = conv(x.transpose(1, 2))[..., :T].transpose(1, 2)
            x = F.gelu(F.layer_norm(x, x.shape[-1:]))
            if exists is not None:  # every layer sees padding as zeros
                x = x * exists[:, :, None]
        return x


class VisionFeatures(nn.Module):
    """Images [B, 3, h, w] -> patches [B, T, D], with fixed positions in data2vec 2.0."""

    def __init__(self, settings: Settings, D: int) -> None:
        super().__init__()
        self.size, self.patch = settings["image_size"], settings["patch_size"]
        self.fixed = settings["positions"] == "sincos"
        self.proj = nn.Conv2d(3, D, self.patch, self.patch)

    def forward(self, pixels: Tensor) -> Tensor:
        if pixels.shape[1:] != (3, self.size, self.size):
            raise ValueError(
                f"pixel_values: expected [B, 3, {self.size}, {self.size}], got {list(pixels.shape)}"
            )
        x = self.proj(pixels.to(self.proj.weight.dtype)).flatten(2).transpose(1, 2)
        if self.fixed:
            x = x + sincos(self.size // self.patch, x.shape[2]).to(x.device, x.dtype)
        return x


def sincos(side: int, D: int) -> Tensor:
    """[T, D]: a half of the channels encodes the column, a half the row."""
    at = torch.arange(side * side)
    frequency = 10_000.0 ** -(torch.arange(D // 4, dtype=torch.float64) / (D // 4))
    angles = [position[:, None] * frequency for position in (at % side, at // side)]
    return torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=1).float()


class TextFeatures(nn.Module):
    """Ids [B, T] -> tokens [B, T, D]. Positions count the tokens that are not padding."""

    def __init__(self, settings: Settings, D: int, eps: float) -> None:
        super().__init__()
        self.pad_id, self.longest = settings["pad_id"], settings["max_tokens"]
        self.tokens = nn.Embedding(settings["vocab_size"], D, padding_idx=self.pad_id)
        rows = self.longest + self.pad_id + 1
        self.positions = nn.Embedding(rows, D, padding_idx=self.pad_id)
        self.norm = nn.LayerNorm(D, eps=eps)

    def forward(self, ids: Tensor) -> Tensor:
        exists = ids != self.pad_id
        if ids.shape[1] > self.longest and int(exists.sum(1).max()) > self.longest:
            raise ValueError(f"input_ids: at most {self.longest} tokens, got {ids.shape[1]}")
        positions = exists.cumsum(1) * exists + self.pad_id
        return self.norm(self.tokens(ids) + self.positions(positions))


class ExtraTokens(nn.Module):
    """Learned tokens in front of the sequence, without positions."""

    def __init__(self, number: int, D: int) -> None:
        super().__init__()
        self.number = number
        self.embedding = nn.Parameter(torch.zeros(number * D))

    def forward(self, x: Tensor) -> Tensor:
        extra = self.embedding.view(1, self.number, -1).to(x.dtype)
        return torch.cat([extra.expand(len(x), -1, -1), x], dim=1)


class MaskToken(nn.Module):
    """The vector that replaces masked tokens in pre-training. It is kept, but not used here."""

    def __init__(self, D: int) -> None:
        super().__init__()
        self.register_buffer("embedding", torch.zeros(1, D))


class Context(nn.Module):
    """Norm, dropout and blocks of one modality before the trunk."""

    def __init__(self, model: Settings, settings: Settings, norm: bool, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(model["dim"], eps=model["norm_eps"]) if norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.prenet = Trunk(
            model, settings["prenet_depth"], settings["prenet_layer_drop"], final_norm=False
        )

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return self.prenet(self.dropout(self.norm(x)), bias)[0]


class FrontEnd(nn.Module):
    """The modules of one modality before the trunk."""

    def __init__(self, name: str, model: Settings, settings: Settings) -> None:
        super().__init__()
        D, H = model["dim"], model["heads"]
        self.positions: ConvPositions | None = None
        self.bias: Alibi | RelativeBias | None = None
        self.features: nn.Module
        norm, dropout, prenet_dropout = True, 0.0, settings["prenet_dropout"]
        if name == "speech":
            self.features = SpeechFeatures(settings, D)
            self.positions = ConvPositions(settings["positions"], D)
            self.bias = Alibi(H) if settings["alibi"] else None
        elif name == "vision":
            self.features = VisionFeatures(settings, D)
            side = settings["image_size"] // settings["patch_size"]
            self.bias = RelativeBias(side, H) if settings["positions"] == "relative" else None
            norm = model["norm"] == "post"
        else:
            self.features = TextFeatures(settings, D, model["norm_eps"])
            norm, dropout = settings["prenet_depth"] > 0, settings["dropout"]
            prenet_dropout = prenet_dropout if norm else 0.0
        self.dropout = nn.Dropout(dropout)
        self.extra = None
        if settings["extra_tokens"]:
            self.extra = ExtraTokens(settings["extra_tokens"], D)
        replaced = settings["masked"] == "replaced" and name != "text"
        self.mask_token = MaskToken(D) if replaced else None
        self.context = Context(model, settings, norm, prenet_dropout)

    def forward(
        self, inputs: Tensor, exists: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """exists [B, T] False for padding -> (tokens [B, E + T, D], attention bias or None,
        exists [B, E + T] or None)."""
        x = self.dropout(self.features(inputs))
        if exists is not None:
            x = x * exists[:, :, None]
        if self.positions is not None:
            x = x + self.positions(x, exists)
        bias = None if self.bias is None else self.bias(x.shape[1])
        E = 0
        if self.extra is not None:
            E = self.extra.number
            x = self.extra(x)
        if bias is not None and (missing := x.shape[1] - bias.shape[-1]):
            bias = F.pad(bias, (missing, 0, missing, 0))
        if exists is not None:
            exists = F.pad(exists, (E, 0), value=True)
            hidden = torch.zeros(exists.shape, dtype=x.dtype, device=x.device)
            hidden = hidden.masked_fill(~exists, float("-inf"))[:, None, None]
            bias = hidden if bias is None else bias + hidden
        return self.context(x, bias), bias, exists
