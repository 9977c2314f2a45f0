"""The student: an encoder (front ends -> trunk) and one predictor per modality.

    2.0: tokens [B, T, D] --positions, views, masked tokens removed--> [R, K, D]
         --context, trunk--> [R, K, D]
         --ConvDecoder, masked slots filled with noise--> predictions [N, D]
    1.0: tokens [B, T, D] --views, masked tokens replaced, positions--> [R, T, D]
         --context, trunk--> [R, T, D]
         --Head--> predictions [N, D]

B samples, M masked views per sample, R = B * M rows, T tokens, K visible tokens, N masked tokens,
E extra tokens per row, D width, H heads. Methods call submodules and never read their parameters:
under ZeRO 3 a parameter is complete only inside the forward of its own module.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from d2v_ds.batch import Batch
from d2v_ds.config.bounds import Amount, BelowOne, Layers, Width
from d2v_ds.transformer import TransformerConfig, Trunk

Encoded = tuple[Tensor, Tensor | None, list[tuple[Tensor, Tensor]]]


class Context(nn.Module):
    """The part of a front end directly before the shared trunk: norm, dropout and, in the larger
    2.0 models, modality-specific blocks (the prenet)."""

    def __init__(
        self,
        model: TransformerConfig,
        *,
        depth: int,
        dropout: float,
        layer_drop: float,
        norm: bool = True,
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(model.dim, eps=model.norm_eps) if norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.prenet = Trunk(model, depth, layer_drop=layer_drop, final_norm=False)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """[R, K, D] -> [R, K, D]."""
        x, _ = self.prenet(self.dropout(self.norm(x)), bias)
        return x


class MaskToken(nn.Module):
    """The learned vector that replaces masked tokens in data2vec 1.0."""

    def __init__(self, dim: int, init: Callable[[Tensor], object]) -> None:
        super().__init__()
        # Two dimensions, because the published models do not exempt it from weight decay.
        self.embedding = nn.Parameter(torch.zeros(1, dim))
        init(self.embedding)

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        """x [R, T, D], seen [R, T] -> x with the mask token where seen is False."""
        return torch.where(seen[:, :, None], x, self.embedding.to(x.dtype))


class ExtraTokens(nn.Module):
    """Learned tokens prepended to the sequence, without positions: the class token."""

    def __init__(self, number: int, dim: int, init: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.number = number
        # One dimension, so that they are exempt from weight decay, as in BEiT and other ViTs.
        self.embedding = nn.Parameter(torch.zeros(number * dim))
        init(self.embedding)

    def forward(self, x: Tensor) -> Tensor:
        """[R, K, D] -> [R, E + K, D]."""
        extra = self.embedding.view(1, self.number, -1).to(x.dtype)
        return torch.cat([extra.expand(len(x), -1, -1), x], dim=1)


class FrontEnd(nn.Module):
    """The parts of one modality before the trunk. The teacher's copy lacks the parts that it shares
    with the student."""

    def __init__(
        self,
        *,
        features: nn.Module,
        context: nn.Module,
        positions: nn.Module | None = None,
        bias: nn.Module | None = None,
        extra: ExtraTokens | None = None,
        mask_token: MaskToken | None = None,
        dropout: float = 0.0,
        zero_padding: bool = False,
    ) -> None:
        super().__init__()
        # inputs -> tokens [B, T, D], including absolute positions if the modality has them
        self.features: nn.Module | None = features
        # tokens [R, T, D], zero where unseen, and exists [R, T, 1] -> addend [R, T, D]
        self.positions = positions
        # positions [R, K] -> attention bias [R, H, K, K], or [R, H, E + K, E + K]
        self.bias = bias
        self.extra = extra
        self.mask_token = mask_token
        self.context: nn.Module | None = context
        self.dropout = nn.Dropout(dropout)  # of the student's tokens, the same for all views
        self.zero_padding = zero_padding  # also if Batch.padded, where padding counts as tokens


class Encoder(nn.Module):
    """Front ends and the trunk. The teacher is a copy of it. After pre-training, only this part is
    used."""

    def __init__(self, model: TransformerConfig, front_ends: Mapping[str, FrontEnd]) -> None:
        super().__init__()
        self.front_ends = nn.ModuleDict(front_ends)
        self.trunk = Trunk(model, model.depth, layer_drop=model.layer_drop)

    def front_end(self, modality: str) -> FrontEnd:
        front_end = self.front_ends[modality]
        assert isinstance(front_end, FrontEnd)
        return front_end

    def features(self, batch: Batch) -> Tensor:
        """Tokens [B, T, D] of the unmasked inputs."""
        features = self.front_end(batch.modality).features
        assert features is not None, "only a teacher shares features"
        return features(batch.inputs)  # type: ignore[no-any-return]

    def whole(
        self, batch: Batch, tokens: Tensor, *, shared: FrontEnd | None = None, collect: int = 0
    ) -> Encoded:
        """Runs context and trunk on unmasked tokens [B, T, D]. Returns the trunk's output
        [B, T, D], its output for the extra tokens [B, E, D] or None, and (FFN output, block output)
        of each of the top `collect` blocks.

        Attention and convolutions ignore padding. shared: the student's front end, which provides
        the parts that the teacher does not have.
        """
        own = self.front_end(batch.modality)
        fallback = shared or own
        valid, exists = batch.valid, batch.exists()
        if batch.shown is not None:
            valid, exists = batch.shown, batch.shown[:, :, None]
        x = without_padding(tokens, valid if own.zero_padding else None, exists)
        positions = own.positions or fallback.positions
        if positions is not None:
            x = x + positions(x, exists)
        everywhere = torch.arange(x.shape[1], device=x.device)[None]
        return self.attend(own, fallback, x, everywhere, valid, collect)

    def views(self, batch: Batch, tokens: Tensor) -> Encoded:
        """Runs context and trunk on the masked views of tokens [B, T, D]. Returns the same as
        `whole`, with [R, K, D] instead of [B, T, D]. In rows with fewer than K visible tokens the
        last slots are meaningless."""
        front_end = self.front_end(batch.modality)
        x = front_end.dropout(tokens)
        if len(x) != len(batch.seen):  # tokens of corrupted inputs are already one row per view
            x = x.repeat_interleave(batch.views, dim=0)  # [R, T, D]
        exists = batch.exists_views()
        if batch.visible is None:
            if front_end.mask_token is not None:
                x = front_end.mask_token(x, batch.seen)
            zeroed = batch.attended() if front_end.zero_padding else None
            x = without_padding(x, zeroed, exists)
            if front_end.positions is not None:
                x = x + front_end.positions(x, exists)
            slots = torch.arange(x.shape[1], device=x.device)[None]
        else:
            if front_end.positions is not None:
                # Masked tokens are zeroed, because convolutional positions would leak them.
                x = x + front_end.positions(x * batch.seen[:, :, None], exists)
            slots = batch.visible.clamp(max=x.shape[1] - 1) if batch.ragged else batch.visible
            x = x.gather(1, slots[:, :, None].expand(-1, -1, x.shape[2]))
        return self.attend(front_end, front_end, x, slots, batch.attended(), 0)

    def attend(
        self,
        own: FrontEnd,
        fallback: FrontEnd,
        x: Tensor,
        positions: Tensor,
        exists: Tensor | None,
        collect: int,
    ) -> Encoded:
        """x [R, K, D], the positions of its tokens [R or 1, K], exists [R, K] or None -> the
        results of `whole`. fallback: the front end that provides the parts missing in `own`."""
        context, extra, bias = (
            own.context or fallback.context,
            own.extra or fallback.extra,
            own.bias or fallback.bias,
        )
        assert context is not None, "neither the teacher nor the student has a context"
        K = x.shape[1]
        x = x if extra is None else extra(x)
        E = x.shape[1] - K
        mask = attention_bias(None if bias is None else bias(positions), exists, E, x)
        x, layers = self.trunk(context(x, mask), mask, collect=collect)
        if E == 0:
            return x, None, layers
        return x[:, E:], x[:, :E], [(ffn[:, E:], block[:, E:]) for ffn, block in layers]


def without_padding(x: Tensor, valid: Tensor | None, exists: Tensor | None) -> Tensor:
    """x [R, T, D] with padding set to zero. valid [R, T] has precedence over exists [R, T, 1]."""
    if valid is not None:
        exists = valid[:, :, None]
    return x if exists is None else x * exists


def attention_bias(
    bias: Tensor | None, exists: Tensor | None, extra: int, like: Tensor
) -> Tensor | None:
    """Additive attention bias [R or 1, H or 1, E + K or 1, E + K], or None if none is needed.

    bias [R, H, K, K], which is extended with zeros for extra tokens, or [R, H, E + K, E + K];
    exists [R, K] False for padding; extra: E; like [R, E + K, D].
    """
    if bias is not None:
        missing = like.shape[1] - bias.shape[-1]
        bias = F.pad(bias, (missing, 0, missing, 0)) if missing else bias
    if exists is None:
        return bias
    exists = F.pad(exists, (extra, 0), value=True)
    hidden = torch.zeros(exists.shape, dtype=like.dtype, device=like.device)
    hidden = hidden.masked_fill(~exists, float("-inf"))[:, None, None, :]  # [R, 1, 1, E + K]
    return hidden if bias is None else bias + hidden


# -------------------------------------------------------------------------------------- predictors


@dataclass(frozen=True)
class DecoderConfig:
    """The convolutional predictor of data2vec 2.0 (fairseq
    examples/data2vec/models/modalities/modules.py, D2vDecoderConfig)."""

    dim: Width = 384
    """Width of the convolutions."""

    depth: Layers = 4
    """The number of convolutions."""

    kernel: Width = 7
    """Kernel size of the convolutions, in tokens; for images, along both axes."""

    groups: Width = 16
    """Groups of the convolutions, which must divide dim and model.dim."""

    dropout: BelowOne = 0.1
    """Dropout of the encoder's output, before the masked slots are filled."""

    residual: bool = True
    """Add a convolution's input to its output if both have the same width."""

    projection: Layers = 1
    """The number of linear layers after the convolutions."""

    noise: Amount = 0.01
    """Standard deviation of the noise that fills the masked slots."""

    zero_last: bool = False
    """Initialise the last layer with zeros, so that training starts from predictions of zero. This
    keeps small, short runs from collapsing."""


class ConvDecoder(nn.Module):
    """Puts visible tokens back at their positions, fills masked slots with noise, and applies
    grouped convolutions to all tokens and linear layers to the masked ones. grid: rows and columns
    of an image's patches, for 2-D convolutions."""

    def __init__(
        self,
        config: DecoderConfig,
        dim: int,
        *,
        grid: tuple[int, int] | None = None,
        init: Callable[[nn.Module], None] | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.grid = grid
        self.dropout = nn.Dropout(config.dropout)
        conv = nn.Conv1d if grid is None else nn.Conv2d
        widths = [dim, *[config.dim] * config.depth]
        self.convs = nn.ModuleList(
            conv(a, b, config.kernel, padding=config.kernel // 2, groups=config.groups)
            for a, b in pairwise(widths)
        )
        self.proj = regressor(config.dim, dim, config.projection, init, config.zero_last)

    def fill(self, batch: Batch, x: Tensor) -> Tensor:
        """Encoder output [R, K, D] -> [R, T, D], with noise at masked tokens and zeros at
        padding."""
        assert batch.visible is not None, "a ConvDecoder needs a batch with masked tokens removed"
        (R, T), (N,), D = batch.seen.shape, batch.masked.shape, x.shape[-1]
        # Slots after a row's last visible token are written to position T, which is cut off.
        full = x.new_zeros(R, T + 1, D)
        masked = batch.masked + batch.masked // T  # [N] in the flattened [R * (T + 1)]
        full.view(-1, D).index_copy_(0, masked, mask_noise(N, D, self.config.noise, x))
        return full.scatter(1, batch.visible[:, :, None].expand_as(x), x)[:, :T]

    def forward(self, batch: Batch, x: Tensor) -> Tensor:
        """[R, K, D] -> predictions [N, D] in the order of batch.masked."""
        x = self.fill(batch, self.dropout(x)).transpose(1, 2)  # [R, D, T]
        exists = batch.exists_views()
        if exists is not None:
            exists = exists.transpose(1, 2)  # [R, 1, T]
        if self.grid is not None:
            assert exists is None, "a batch of images has padding"
            x = x.reshape(*x.shape[:2], *self.grid)  # [R, D, h, w]
        for conv in self.convs:
            y = conv(x)[(..., *(slice(n) for n in x.shape[2:]))]  # even kernels add one position
            y = F.gelu(F.layer_norm(y.movedim(1, -1), y.shape[1:2]).movedim(-1, 1))
            if exists is not None:
                y = y * exists
            x = x + y if self.config.residual and x.shape == y.shape else y
        x = x.flatten(2).transpose(1, 2).reshape(-1, x.shape[1])  # [R * T, D of the decoder]
        return self.proj(x.index_select(0, batch.masked))  # type: ignore[no-any-return]


class Head(nn.Module):
    """The predictor of data2vec 1.0: linear layers on the encoder's output at masked tokens."""

    def __init__(
        self, dim: int, layers: int, init: Callable[[nn.Module], None] | None, zero_last: bool
    ) -> None:
        super().__init__()
        self.proj = regressor(dim, dim, layers, init, zero_last)

    def forward(self, batch: Batch, x: Tensor) -> Tensor:
        """[R, T, D] -> predictions [N, D] in the order of batch.masked."""
        return self.proj(x.flatten(0, 1).index_select(0, batch.masked))  # type: ignore[no-any-return]


def regressor(
    width: int,
    dim: int,
    layers: int,
    init: Callable[[nn.Module], None] | None,
    zero_last: bool,
) -> nn.Module:
    """`layers` linear layers from `width` to `dim`, with GELU between them and a hidden width of
    2 * width. init: None for torch's default. zero_last: initialises the last layer with zeros."""
    widths = [width, *[2 * width] * (layers - 1), dim]
    linears = [nn.Linear(a, b) for a, b in pairwise(widths)]
    for linear in linears:
        if init is not None:
            init(linear)
    if zero_last:
        nn.init.zeros_(linears[-1].weight)
        nn.init.zeros_(linears[-1].bias)
    parts = [part for linear in linears for part in (linear, nn.GELU())][:-1]
    return parts[0] if layers == 1 else nn.Sequential(*parts)


def mask_noise(N: int, D: int, std: float, like: Tensor) -> Tensor:
    """The content of masked slots: noise from N(0, std^2), [N, D], drawn at every call."""
    return torch.randn(N, D, dtype=like.dtype, device=like.device) * std


class Student(nn.Module):
    """The encoder and one predictor per modality."""

    def __init__(
        self,
        model: TransformerConfig,
        front_ends: Mapping[str, FrontEnd],
        predictors: Mapping[str, nn.Module],
    ) -> None:
        super().__init__()
        self.encoder = Encoder(model, front_ends)
        self.predictors = nn.ModuleDict(predictors)

    def predict(self, batch: Batch, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """Tokens [B, T, D] of the unmasked input -> predictions [N, D] for the masked tokens, and
        the encoder's output for the extra tokens, [R, E, D] or None."""
        front_end = self.encoder.front_end(batch.modality)
        if batch.corrupted is not None:
            assert front_end.features is not None, "only a teacher shares features"
            tokens = front_end.features(batch.corrupted)  # [R, T, D]
        x, extra, _ = self.encoder.views(batch, tokens)
        return self.predictors[batch.modality](batch, x), extra
