"""The weights of a model and its settings, and the encoder that they make."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from d2v_ds.config import Config
from d2v_ds.config.decoding import decode
from d2v_ds.errors import UserError
from d2v_ds.modalities import create_modalities
from d2v_ds.student import Encoder
from d2v_ds.transformer import TransformerConfig

Which = Literal["student", "teacher"]
Part = Literal["student", "teacher", "head"]
Settings = dict[str, Any]


@dataclass(frozen=True)
class Weights:
    """A trained model. Its tensors are read when `tensors` is called."""

    path: Path

    model: Settings
    """model.*, complete."""

    modality: dict[str, Settings]
    """{name: modality.NAME.*}, complete."""

    tensors: Callable[[Part], Mapping[str, Tensor]]
    """fp32 tensors on the CPU. student: encoder.* and, if the source has them, predictors.*;
    teacher: the averages, encoder.*, without the parts that the teacher shares with the student, or
    empty if the source has none; head: head.* of a fine-tuned model, or empty."""

    step: int = 0
    """Optimizer steps of the run that made them; 0: unknown."""

    finetune: Settings = field(default_factory=dict)
    """finetune.* of a fine-tuned model; empty for a pre-trained one."""

    about: Settings = field(default_factory=dict)
    """What is known of their origin, for a model card: recipe, data, metrics ..."""

    config: Config | None = None
    """The configuration of the run; None for other sources."""

    files: Mapping[str, Path] = field(default_factory=dict)
    """Files that belong to the model, by name: tokenizer.model."""

    def only_modality(self, wanted: str = "") -> str:
        """The modality that was asked for, or the only one. Raises UserError."""
        names = sorted(self.modality)
        if not wanted and len(names) == 1:
            return names[0]
        if wanted not in names:
            given = f"no {wanted!r} in this run" if wanted else "this run has several; name one"
            raise UserError(f"modality: {given} (it has: {', '.join(names)})")
        return wanted

    def encoder(self, which: Which = "student") -> dict[str, Tensor]:
        """The parameters of the encoder, without the prefix encoder. The teacher's has its averages
        and the student's values in the parts that they share. Raises UserError if there is no
        teacher."""
        found = dict(self.tensors("student"))
        if which == "teacher":
            averages = self.tensors("teacher")
            if not averages:
                raise UserError(f"{self.path}: has no teacher's weights; use the student's")
            found |= averages
        return {
            name.removeprefix("encoder."): tensor
            for name, tensor in found.items()
            if name.startswith("encoder.")
        }


def build_encoder(weights: Weights, which: Which = "student") -> Encoder:
    """The encoder with its weights, in fp32, in evaluation mode. Raises UserError if tensors are
    missing or do not fit the settings."""
    model = decode(TransformerConfig, weights.model, "model")
    modalities = create_modalities(weights.modality)
    encoder = Encoder(model, {name: kind.front_end(model) for name, kind in modalities.items()})
    load_parameters(encoder, weights.encoder(which), weights.path, "encoder.")
    return encoder.eval()


@torch.no_grad()
def load_parameters(
    module: nn.Module, values: Mapping[str, Tensor], path: Path, prefix: str = ""
) -> None:
    """Copies a value into every parameter of a module. path: where they come from; prefix: of the
    names in messages. Raises UserError if one is missing, has another shape or is not finite."""
    for name, parameter in module.named_parameters():
        value = values.get(name)
        if value is None or value.shape != parameter.shape:
            found = "is missing" if value is None else f"has shape {list(value.shape)}"
            raise UserError(f"{path}: {prefix}{name} {found}, expected {list(parameter.shape)}")
        refuse_not_finite(path, f"{prefix}{name}", value)
        parameter.copy_(value)


def refuse_not_finite(path: Path, name: str, value: Tensor) -> None:
    """Raises UserError for NaN and infinite values: whatever is computed with them looks like the
    result of a poor model."""
    if not value.isfinite().all():
        raise UserError(
            f"{path}: {name} has values that are NaN or infinite, so its run has diverged; use an "
            "earlier checkpoint, or other weights"
        )
