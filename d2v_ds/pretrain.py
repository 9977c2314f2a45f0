"""data2vec pre-training: a student regresses what its teacher sees. Read this first.

    inputs --features--> tokens ---------masked views---> student ---predictor---> predictions
                            \\                                                          |
                             `--whole--> teacher --top K layers, normalised--> targets -+-> loss

B samples, M masked views a sample, T tokens, N masked tokens in the batch, D width, P places.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from d2v_ds.batch import Batch
from d2v_ds.config import Config, Target
from d2v_ds.config.decoding import decode, to_dict
from d2v_ds.config.validation import require_one_each
from d2v_ds.errors import UserError
from d2v_ds.loss import class_loss, make_targets, regression_loss
from d2v_ds.modalities import create_modalities
from d2v_ds.modalities.base import Modality
from d2v_ds.student import Student
from d2v_ds.teacher import Teacher
from d2v_ds.transformer import TransformerConfig

SAMPLED = 1024  # targets of a micro-batch, at most, of which the effective rank is told
PLACES = 8  # in time, at which targets are compared between samples


class Pretrain(nn.Module):
    """Student, teacher and loss; forward(batch, masked_count) -> (loss, stats)."""

    def __init__(
        self, model: TransformerConfig, modalities: Mapping[str, Modality], target: Target
    ) -> None:
        super().__init__()
        self.modalities = modalities
        self.target = target
        self.student = Student(
            model,
            {name: modality.front_end(model) for name, modality in modalities.items()},
            {name: modality.predictor(model) for name, modality in modalities.items()},
        )
        shared = {name: modality.config.shared for name, modality in modalities.items()}
        self.teacher = Teacher(self.student.encoder, shared)

    def forward(self, batch: Batch, masked_count: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The batch's share of the step's loss, whose normaliser is the step's `masked_count` over
        all micro-batches and ranks, and sums for the metrics (metrics.py says what is made of
        them)."""
        modality = self.modalities[batch.modality]
        # Where the student reads corrupted inputs, the whole ones are the teacher's alone.
        with torch.set_grad_enabled(torch.is_grad_enabled() and batch.corrupted is None):
            tokens = self.student.encoder.features(batch)  # [B, T, D]

        whole = self.targets(batch, tokens)  # [B, T, D]
        targets = at_masked(whole, batch)  # [N, D]
        predictions, extra = self.student.predict(batch, tokens)  # [N, D], [R, E, D]

        config = modality.config
        total = regression_loss(
            predictions, targets, beta=config.loss_beta, scale=config.loss_scale
        )
        weight = modality.class_weight(len(batch.seen))
        if weight > 0:
            assert extra is not None, f"{batch.modality} has no extra token for its class loss"
            R, T = batch.seen.shape
            masked = torch.zeros(R, device=total.device).index_add_(
                0, batch.masked // T, torch.ones_like(batch.masked, dtype=torch.float32)
            )
            total = total + weight * class_loss(extra[:, -1], whole, batch.valid, masked)
        loss = total / masked_count
        stats = self.stats(
            batch, tokens.detach(), whole, targets, predictions.detach(), loss.detach()
        )
        return loss * config.loss_weight, stats

    @torch.no_grad()
    def targets(self, batch: Batch, tokens: Tensor) -> Tensor:
        """The regression targets of all tokens [B, T, D], fp32; padding's mean nothing."""
        layers = self.teacher.layers(self.student.encoder, batch, tokens, self.target.top_k)
        source = 0 if self.target.source == "ffn" else 1
        return make_targets(
            [layer[source] for layer in layers],
            None if batch.padded else batch.valid,
            layer_norm=self.target.layer_norm,
            final_norm=self.target.final_norm,
        )

    @torch.no_grad()
    def blocks(self, batch: Batch, weights: Literal["student", "teacher"]) -> list[Tensor]:
        """What every block makes of the unmasked batch, [B, T, D] each: features for probes."""
        encoder = self.student.encoder
        tokens = encoder.features(batch)
        depth = len(encoder.trunk.blocks)
        if weights == "teacher":
            layers = self.teacher.layers(encoder, batch, tokens, depth)
        else:
            _, _, layers = encoder.whole(batch, tokens, collect=depth)
        return [block for _, block in layers]

    @torch.no_grad()
    def stats(
        self,
        batch: Batch,
        tokens: Tensor,
        whole: Tensor,
        targets: Tensor,
        predictions: Tensor,
        loss: Tensor,
    ) -> dict[str, Tensor]:
        """fp32 sums over the batch: scalars; [D] for masked targets and predictions; [D, D] for
        some targets; [P, D] for all samples' targets at P places."""
        predictions = predictions.float()
        N, B = targets.shape[0], tokens.shape[0]
        sampled = targets[:: max(1, -(-N // SAMPLED))]
        places = (torch.arange(PLACES, device=whole.device) * 2 + 1) * whole.shape[1]
        places = places // (2 * PLACES)
        placed = whole.index_select(1, places)  # [B, P, D]
        exists = torch.ones_like(placed[:, :, :1])
        if batch.valid is not None:
            exists = batch.valid.index_select(1, places)[:, :, None].float()
            placed = placed * exists
        return {
            "loss": loss,
            "masked": count(N, loss),
            "tokens": count(batch.seen.numel(), loss)
            if batch.valid is None
            else batch.valid.sum().float() * batch.views,
            "error": (predictions - targets).square().sum(),
            "target_sum": targets.sum(0),
            "target_sq": targets.square().sum(0),
            "prediction_sum": predictions.sum(0),
            "prediction_sq": predictions.square().sum(0),
            "front_std": spread_over_time(tokens.float(), batch.valid).sum(),
            "samples": count(B, loss),
            "sampled": count(len(sampled), loss),
            "sampled_sum": sampled.sum(0),
            "sampled_products": sampled.T @ sampled,
            "placed": exists[:, :, 0].sum(0),
            "placed_sum": placed.sum(0),
            "placed_sq": placed.square().sum(0),
        }

    def part(self, name: str) -> str:
        """The modality that a parameter belongs to; "" for what all of them train."""
        pieces = name.split(".")
        own = {"front_ends", "predictors"} & set(pieces[1:3])
        return pieces[pieces.index(own.pop()) + 1] if own else ""

    def tracked(self) -> dict[str, str]:
        """{teacher's parameter: the student's that it is the average of}. Every parameter of the
        teacher has one, of the same shape."""
        students = dict(self.student.named_parameters(prefix="student"))
        pairs = {}
        for name, parameter in self.teacher.named_parameters(prefix="teacher"):
            student = "student" + name.removeprefix("teacher")
            assert student in students, f"{name} has no counterpart in the student"
            pairs[name] = student
            assert parameter.shape == students[student].shape, f"{name} differs in shape"
        return pairs


def at_masked(x: Tensor, batch: Batch) -> Tensor:
    """Of x [B, T, D] what is to be predicted, in the order of batch.masked: [N, D]."""
    T = x.shape[1]
    row, position = batch.masked // T, batch.masked % T
    index = row // batch.views * T + position  # from [B * M * T] to [B * T]
    return x.flatten(0, 1).index_select(0, index)


def count(n: int, like: Tensor) -> Tensor:
    """n as a tensor on the device, without a copy from the host."""
    return torch.full((), float(n), dtype=torch.float32, device=like.device)


def spread_over_time(tokens: Tensor, valid: Tensor | None) -> Tensor:
    """Standard deviation over the tokens, mean over channels: [B, T, D] -> [B]. Near 0 when the
    front end has collapsed, which the targets' spread does not show."""
    if valid is None:
        return tokens.std(1, correction=0).mean(-1)
    weight = valid[:, :, None].float()
    number = weight.sum(1, keepdim=True)
    mean = (tokens * weight).sum(1, keepdim=True) / number
    variance = ((tokens - mean).square() * weight).sum(1) / number[:, 0]
    return variance.sqrt().mean(-1)


def build_pretrain(config: Config) -> Pretrain:
    """The task that a configuration describes. Raises UserError for its model.* and modality.*."""
    model = decode(TransformerConfig, config.model, "model")
    if config.target.top_k > model.depth:
        raise UserError(
            f"target.top_k: {config.target.top_k} exceeds model.depth={model.depth}; lower it"
        )
    modalities = create_modalities(config.modality)
    require_one_each(config)
    return Pretrain(model, modalities, config.target)


def resolved(config: Config) -> Config:
    """The configuration with every default of model.* and modality.* written out. Raises
    UserError."""
    return dataclasses.replace(
        config,
        model=to_dict(decode(TransformerConfig, config.model, "model")),
        modality={
            name: to_dict(modality.config)
            for name, modality in create_modalities(config.modality).items()
        },
    )
