"""The student: encoder (front ends -> trunk) and one predictor a modality.

    inputs --features--> tokens [B, T, D] --positions, masks, views--> [B * M, K, D] --context-->
    --trunk--> [B * M, K, D] --predictor: masked slots filled with noise--> predictions [N, D]

B samples, M masked views a sample, R = B * M rows, T tokens, K visible tokens, N masked tokens,
D width, H heads. Methods call submodules and never read a parameter themselves: under ZeRO 3 a
parameter is whole only inside its owner's forward.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from d2v_ds.batch import Batch
from d2v_ds.transformer import Alibi, TransformerConfig, Trunk


class Context(nn.Module):
    """What data2vec 2.0 does to visible tokens before the shared trunk: norm, dropout and, in the
    larger models, blocks of the modality's own ("prenet")."""

    def __init__(
        self, model: TransformerConfig, *, depth: int, dropout: float, layer_drop: float
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(model.dim, eps=model.norm_eps)
        self.dropout = nn.Dropout(dropout)
        self.prenet = Trunk(model, depth, layer_drop=layer_drop)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """[R, K, D] -> [R, K, D]."""
        x, _ = self.prenet(self.dropout(self.norm(x)), bias)
        return x


class FrontEnd(nn.Module):
    """The parts of one modality before the trunk. A teacher's copy lacks those it shares."""

    features: nn.Module | None  # inputs -> tokens [B, T, D]
    positions: nn.Module | None  # tokens [R, T, D], zero where unseen, and seen -> addend [R, T, D]
    alibi: Alibi | None  # positions [R, K] -> attention bias [R, H, K, K]
    context: Context

    def __init__(
        self,
        features: nn.Module,
        positions: nn.Module | None,
        alibi: Alibi | None,
        context: Context,
    ) -> None:
        super().__init__()
        self.features = features
        self.positions = positions
        self.alibi = alibi
        self.context = context


class Encoder(nn.Module):
    """Front ends and the trunk: what the teacher is a copy of, and what is exported."""

    def __init__(self, model: TransformerConfig, front_ends: Mapping[str, FrontEnd]) -> None:
        super().__init__()
        self.front_ends = nn.ModuleDict(front_ends)
        self.trunk = Trunk(model, model.depth, layer_drop=model.layer_drop)

    def front_end(self, modality: str) -> FrontEnd:
        front_end = self.front_ends[modality]
        assert isinstance(front_end, FrontEnd)
        return front_end

    def whole(
        self,
        modality: str,
        tokens: Tensor,
        valid: Tensor | None,
        *,
        positions: nn.Module | None = None,
        collect: int = 0,
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Unmasked tokens [B, T, D] through context and trunk -> as Trunk.forward.

        valid [B, T]: padding is neither attended to nor seen by convolutions. positions: in place
        of the front end's own, which a teacher that shares them lacks.
        """
        front_end, T = self.front_end(modality), tokens.shape[1]
        exists = None if valid is None else valid[:, :, None]
        x = tokens if exists is None else tokens * exists
        positions = positions or front_end.positions
        if positions is not None:
            x = x + positions(x, exists)
        everywhere = torch.arange(T, device=tokens.device)[None]
        bias = attention_bias(front_end.alibi, everywhere, valid, x.dtype)
        return self.trunk(front_end.context(x, bias), bias, collect=collect)  # type: ignore[no-any-return]

    def views(self, batch: Batch, tokens: Tensor) -> Tensor:
        """The visible tokens of all masked views: tokens [B, T, D] -> [R, K, D]; rows with fewer
        than K visible tokens carry meaningless values in their last slots."""
        front_end = self.front_end(batch.modality)
        (_, T, D), (R, K) = tokens.shape, batch.visible.shape
        x = tokens.repeat_interleave(batch.views, dim=0)  # [R, T, D]
        if front_end.positions is not None:
            # Positions come from the sequence with masked tokens zeroed, else they would leak.
            x = x + front_end.positions(x * batch.seen[:, :, None], batch.valid_views())
        slots = batch.visible.clamp(max=T - 1) if batch.ragged else batch.visible
        x = x.gather(1, slots[:, :, None].expand(R, K, D))
        exists = batch.visible < T if batch.ragged else None
        bias = attention_bias(front_end.alibi, slots, exists, x.dtype)
        x, _ = self.trunk(front_end.context(x, bias), bias)
        return x


def attention_bias(
    alibi: Alibi | None, positions: Tensor, exists: Tensor | None, dtype: torch.dtype
) -> Tensor | None:
    """Additive attention bias [R or 1, H or 1, K, K], or None where none is needed.

    positions [R, K] int64 of the tokens in their sequence; exists [R, K] False for padding.
    """
    bias = None if alibi is None else alibi(positions)
    if exists is not None:
        hidden = torch.zeros(exists.shape, dtype=dtype, device=exists.device)
        hidden = hidden.masked_fill(~exists, float("-inf"))[:, None, None, :]  # [R, 1, 1, K]
        bias = hidden if bias is None else bias + hidden
    return bias


@dataclass(frozen=True)
class DecoderConfig:
    """The convolutional predictor of data2vec 2.0 (data2vec.md section 5)."""

    dim: int = 384
    depth: int = 4
    kernel: int = 7
    groups: int = 16
    dropout: float = 0.1  # of the encoder's output, before the masked slots are filled
    residual: bool = True
    noise: float = 0.01  # standard deviation of what fills the masked slots
    zero_last: bool = False  # begin with predictions of zero: keeps small, short runs from collapse


class ConvDecoder(nn.Module):
    """Visible tokens back in place, noise in the masked slots, grouped convolutions over all of
    them, a linear layer on the masked ones."""

    def __init__(self, config: DecoderConfig, dim: int) -> None:
        super().__init__()
        self.config = config
        self.dropout = nn.Dropout(config.dropout)
        widths = [dim, *[config.dim] * config.depth]
        self.convs = nn.ModuleList(
            nn.Conv1d(a, b, config.kernel, padding=config.kernel // 2, groups=config.groups)
            for a, b in pairwise(widths)
        )
        self.proj = nn.Linear(config.dim, dim)
        if config.zero_last:
            nn.init.zeros_(self.proj.weight)
            nn.init.zeros_(self.proj.bias)

    def fill(self, batch: Batch, x: Tensor) -> Tensor:
        """Encoder output [R, K, D] -> [R, T, D]: noise where masked, zeros where nothing is."""
        (R, T), (N,), D = batch.seen.shape, batch.masked.shape, x.shape[-1]
        # Slots past a row's last visible token go to position T, which is cut off.
        full = x.new_zeros(R, T + 1, D)
        masked = batch.masked + batch.masked // T  # [N] in the flattened [R * (T + 1)]
        full.view(-1, D).index_copy_(0, masked, mask_noise(N, D, self.config.noise, x))
        return full.scatter(1, batch.visible[:, :, None].expand_as(x), x)[:, :T]

    def forward(self, batch: Batch, x: Tensor) -> Tensor:
        """[R, K, D] -> predictions [N, D] in the order of batch.masked."""
        x = self.fill(batch, self.dropout(x)).transpose(1, 2)  # [R, D, T]
        valid = batch.valid_views()
        exists = None if valid is None else valid.transpose(1, 2)  # [R, 1, T]
        for conv in self.convs:
            y = conv(x)[..., : x.shape[-1]]  # an even kernel gives one position too many
            y = F.gelu(F.layer_norm(y.transpose(1, 2), y.shape[1:2]).transpose(1, 2))
            if exists is not None:
                y = y * exists
            x = x + y if self.config.residual and x.shape == y.shape else y
        x = x.transpose(1, 2).reshape(-1, x.shape[1])  # [R * T, D of the decoder]
        return self.proj(x.index_select(0, batch.masked))  # type: ignore[no-any-return]


def mask_noise(N: int, D: int, std: float, like: Tensor) -> Tensor:
    """What fills the masked slots: fresh N(0, std^2) every time, [N, D], not learned."""
    return torch.randn(N, D, dtype=like.dtype, device=like.device) * std


class Student(nn.Module):
    """The encoder and one predictor a modality."""

    def __init__(
        self,
        model: TransformerConfig,
        front_ends: Mapping[str, FrontEnd],
        predictors: Mapping[str, nn.Module],
    ) -> None:
        super().__init__()
        self.encoder = Encoder(model, front_ends)
        self.predictors = nn.ModuleDict(predictors)

    def predict(self, batch: Batch, tokens: Tensor) -> Tensor:
        """Tokens [B, T, D] of the whole input -> predictions [N, D] at the masked positions."""
        return self.predictors[batch.modality](batch, self.encoder.views(batch, tokens))  # type: ignore[no-any-return]
