"""What an export contains: the encoder with one set of weights, and what is known about it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from d2v_ds.errors import UserError
from d2v_ds.finetune.labels import LABELS_FILE
from d2v_ds.modalities import create_modalities
from d2v_ds.modalities.base import Modality
from d2v_ds.student import Encoder
from d2v_ds.weights import Weights, Which, build_encoder

Settings = dict[str, Any]

SUPPORTED = ("speech", "vision", "text")


@dataclass(frozen=True)
class Exported:
    """The content of an export."""

    which: Which
    step: int
    model: Settings  # model.*
    modality: dict[str, Settings]  # {name: modality.NAME.*}
    finetune: Settings  # finetune.*; empty for a pre-trained model
    about: Settings
    module: Encoder
    head: dict[str, Tensor]  # head.*
    predictors: dict[str, Tensor]  # predictors.*
    special_ids: Mapping[str, int] = field(default_factory=dict)  # {bos, eos ...} of the tokenizer

    @property
    def names(self) -> list[str]:
        """Its modalities."""
        return sorted(self.modality)

    @property
    def encoder(self) -> dict[str, Tensor]:
        """encoder.*: the trainable tensors."""
        return {f"encoder.{name}": tensor.detach() for name, tensor in named(self.module)}

    @property
    def modalities(self) -> dict[str, Modality]:
        return create_modalities(self.modality)

    def with_special_ids(self, ids: Mapping[str, int]) -> Exported:
        return dataclasses.replace(self, special_ids=ids)

    def entry(self) -> Settings:
        """The entry d2v_ds of config.json, from which d2v_ds reads the folder again."""
        return {
            "version": 1,
            "weights": self.which,
            "step": self.step,
            "model": self.model,
            "modality": self.modality,
            "finetune": self.finetune,
            "about": self.about,
        }


def named(module: torch.nn.Module) -> list[tuple[str, Tensor]]:
    return list(module.named_parameters())


def select(found: Weights, which: Which, modality: str, about: Settings) -> Exported:
    """The weights to export. modality: of a model with several, only that one; "": all. about:
    their origin. Raises UserError if there are no such weights or modality, or no format for
    them."""
    kept = dict(found.modality)
    if modality:
        wanted = found.only_modality(modality)
        kept = {wanted: kept[wanted]}
    other = sorted(kept.keys() - set(SUPPORTED))
    if other:
        raise UserError(
            f"{found.path}: modality {', '.join(other)} cannot be exported (supported: "
            f"{', '.join(SUPPORTED)}); choose one with --modality"
        )
    head = dict(found.tensors("head")) if found.finetune else {}
    if head and which == "teacher":
        raise UserError(f"{found.path}: is fine-tuned and has no teacher; use --weights student")
    finetune = portable(found.finetune) if head else {}
    if finetune and len(kept) > 1:
        raise UserError(
            f"{found.path}: is fine-tuned on one of {', '.join(kept)}; name it with --modality"
        )
    chosen = dataclasses.replace(found, modality=kept)
    return Exported(
        which=which,
        step=found.step,
        model=found.model,
        modality=kept,
        finetune=finetune,
        about=about,
        module=build_encoder(chosen, which),
        head=head,
        predictors=predictors(found, kept),
    )


def portable(finetune: Settings) -> Settings:
    """finetune.* without the folders of this machine."""
    return {**finetune, "tokenizer": LABELS_FILE if finetune.get("tokenizer") else ""}


def predictors(found: Weights, kept: Mapping[str, Settings]) -> dict[str, Tensor]:
    """The predictors of these modalities, with which pre-training can go on."""
    return {
        name: tensor
        for name, tensor in found.tensors("student").items()
        if name.startswith("predictors.") and name.split(".")[1] in kept
    }
