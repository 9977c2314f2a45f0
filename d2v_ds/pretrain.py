"""data2vec pre-training: a student predicts the representations that its teacher computes from the
whole input.

    inputs --features--> tokens --masked views--> student --predictor--> predictions
                           |                                                  |
                           `--whole--> teacher --top K layers--> targets -----+--> loss

B samples, M masked views per sample, R = B * M rows, T tokens, N masked tokens in the batch,
E extra tokens per row, D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from d2v_ds.batch import Batch
from d2v_ds.config import Config, Target
from d2v_ds.config.config import require_one_each
from d2v_ds.config.decoding import decode, to_dict
from d2v_ds.errors import UserError
from d2v_ds.loss import class_loss, make_targets, regression_loss
from d2v_ds.modalities import create_modalities
from d2v_ds.modalities.base import Modality
from d2v_ds.pretrain_report import PretrainReport, measure
from d2v_ds.student import Student
from d2v_ds.task import Task
from d2v_ds.teacher import Teacher
from d2v_ds.transformer import TransformerConfig


class Pretrain(Task):
    """Student, teacher and loss."""

    weights_prefix: ClassVar[str] = "student."
    teacher: Teacher

    def __init__(
        self, model: TransformerConfig, modalities: Mapping[str, Modality], target: Target
    ) -> None:
        super().__init__()
        self.modalities = modalities
        self.target = target
        self.report = PretrainReport()
        self.student = Student(
            model,
            {name: modality.front_end(model) for name, modality in modalities.items()},
            {name: modality.predictor(model) for name, modality in modalities.items()},
        )
        shared = {name: modality.config.shared for name, modality in modalities.items()}
        self.teacher = Teacher(self.student.encoder, shared)

    def forward(self, batch: Batch, count: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The batch's share of the step's loss, and sums for the report (pretrain_report.py).

        count: masked tokens of the whole step, over all micro-batches and ranks.
        """
        modality = self.modalities[batch.modality]
        # If the student reads corrupted inputs, only the teacher uses the intact ones.
        with torch.set_grad_enabled(torch.is_grad_enabled() and batch.corrupted is None):
            tokens = self.student.encoder.features(batch)  # [B, T, D]

        all_targets = self.targets(batch, tokens)  # [B, T, D]
        targets = at_masked(all_targets, batch)  # [N, D]
        predictions, extra = self.student.predict(batch, tokens)  # [N, D], [R, E, D]

        config = modality.config
        total = regression_loss(
            predictions, targets, beta=config.loss_beta, scale=config.loss_scale
        )
        weight = modality.class_weight(len(batch.seen))
        if weight > 0:
            assert extra is not None, f"{batch.modality} has no extra token for its class loss"
            total = total + weight * class_loss(
                extra[:, -1], all_targets, batch.valid, masked_of(batch)
            )
        loss = total / count  # reported as it is; loss_weight only scales the gradient
        sums = measure(
            batch,
            tokens=tokens.detach(),
            all_targets=all_targets,
            targets=targets,
            predictions=predictions.detach(),
            loss=loss.detach(),
        )
        return loss * config.loss_weight, sums

    @torch.no_grad()
    def targets(self, batch: Batch, tokens: Tensor) -> Tensor:
        """The regression targets of all tokens, [B, T, D] in fp32; undefined for padding."""
        layers = self.teacher.layers(self.student.encoder, batch, tokens, self.target.top_k)
        output = 0 if self.target.source == "ffn" else 1  # of (FFN output, block output)
        return make_targets(
            [layer[output] for layer in layers],
            None if batch.padded else batch.valid,  # as fairseq: its statistics include padding
            layer_norm=self.target.layer_norm,
            final_norm=self.target.final_norm,
        )

    def part(self, name: str) -> str:
        """The modality whose front end or predictor a parameter is in; "" for the trunk."""
        pieces = name.split(".")
        own = {"front_ends", "predictors"} & set(pieces[1:3])
        return pieces[pieces.index(own.pop()) + 1] if own else ""

    def averages(self) -> dict[str, str]:
        """Every parameter of the teacher averages the student's parameter with the same name."""
        students = dict(self.student.named_parameters(prefix="student"))
        pairs = {}
        for name, parameter in self.teacher.named_parameters(prefix="teacher"):
            student = "student" + name.removeprefix("teacher")
            assert student in students, f"{name} has no counterpart in the student"
            pairs[name] = student
            assert parameter.shape == students[student].shape, f"{name} differs in shape"
        return pairs

    @staticmethod
    def resolve(config: Config) -> Config:
        """The configuration with every default of model.* and modality.* written out. Raises
        UserError."""
        model, modalities = parts_of(config)
        return dataclasses.replace(
            config,
            model=to_dict(model),
            modality={name: to_dict(modality.config) for name, modality in modalities.items()},
        )

    @classmethod
    def create(cls, config: Config) -> Pretrain:
        """Raises UserError for invalid settings in model.* or modality.*."""
        if config.init_from == "nothing":
            raise UserError("init_from: nothing is for fine-tuning; omit init for random weights")
        model, modalities = parts_of(config)
        require_one_each(config)
        return cls(model, modalities, config.target)


def parts_of(config: Config) -> tuple[TransformerConfig, dict[str, Modality]]:
    """The trunk's settings and the modalities. Raises UserError if they do not fit together."""
    model, modalities = model_of(config), create_modalities(config.modality)
    for modality in modalities.values():
        modality.check_model(model)
    return model, modalities


def model_of(config: Config) -> TransformerConfig:
    """Raises UserError if model.* is invalid or has fewer blocks than the targets need."""
    model = decode(TransformerConfig, config.model, "model")
    if config.target.top_k > model.depth:
        raise UserError(
            f"target.top_k: {config.target.top_k} exceeds model.depth={model.depth}; lower it"
        )
    return model


def at_masked(x: Tensor, batch: Batch) -> Tensor:
    """The rows of x [B, T, D] that are to be predicted, in the order of batch.masked: [N, D]."""
    T = x.shape[1]
    row, position = batch.masked // T, batch.masked % T
    index = row // batch.views * T + position  # from [B * M * T] to [B * T]
    return x.flatten(0, 1).index_select(0, index)


def masked_of(batch: Batch) -> Tensor:
    """The number of masked tokens of each view, [R] in fp32."""
    R, T = batch.seen.shape
    ones = torch.ones_like(batch.masked, dtype=torch.float32)
    return torch.zeros(R, device=ones.device).index_add_(0, batch.masked // T, ones)
