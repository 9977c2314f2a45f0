"""A pre-trained encoder as a plain torch module.

    anything that open_weights opens --load_encoder--> PretrainedEncoder
    examples --PretrainedEncoder--> features of every block, [B, T, D] each

Needs neither DeepSpeed nor the data that the model was trained on.

B samples, T tokens, D width, L blocks.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from d2v_ds.modalities import create_modalities
from d2v_ds.modalities.base import Modality
from d2v_ds.pretrain import Pretrain
from d2v_ds.student import Encoder
from d2v_ds.weights import Weights, Which, build_encoder, open_weights


class EncoderOutput(NamedTuple):
    """Features of a padded batch."""

    blocks: list[Tensor]
    """The output of each of the L blocks, [B, T, D]; undefined for padding."""

    valid: Tensor | None
    """[B, T] bool: which tokens exist; None if all of them do."""


class PretrainedEncoder(nn.Module):
    """Front end and trunk for one modality, without masks, in evaluation mode and fp32.

    forward(examples) takes a list of examples as `modality.decode(members, None)` and
    `d2v_ds.webdataset` return (normalised waveforms [S], pixels [3, h, w], token ids [T]); they
    may differ in length, and padding does not influence the result. All parameters are trainable,
    so the module can be fine-tuned; `requires_grad_(False)` freezes it.
    """

    def __init__(self, encoder: Encoder, modality: Modality, step: int, weights: Which) -> None:
        super().__init__()
        self.encoder = encoder
        self.modality = modality
        self.step = step  # of the run, at which the weights were saved
        self.weights = weights
        self.eval()

    @property
    def depth(self) -> int:
        """L."""
        return len(self.encoder.trunk.blocks)

    def forward(self, examples: Sequence[Any]) -> EncoderOutput:
        batch = self.modality.unmasked(examples).to(next(self.parameters()).device)
        tokens = self.encoder.features(batch)
        _, _, layers = self.encoder.whole(batch, tokens, collect=self.depth)
        return EncoderOutput([block for _, block in layers], batch.valid)


def load_encoder(
    path: str | Path, *, weights: Which = "student", modality: str = ""
) -> PretrainedEncoder:
    """The encoder of everything that `open_weights` opens: a run folder (its newest valid
    checkpoint), a checkpoint's folder, an exported folder, a folder of Hugging Face transformers
    (data2vec 1.0), or a checkpoint of fairseq or data2vec_vision.

    weights: the student's or the teacher's. modality: required for a model with several; "": the
    only one. Raises UserError if there are no such weights, or if the modality must be named.
    """
    return pretrained(open_weights(path), weights, modality)


def pretrained(found: Weights, which: Which, modality: str = "") -> PretrainedEncoder:
    """As `load_encoder`, for weights that are already open."""
    kind = create_modalities(found.modality)[found.only_modality(modality)]
    return PretrainedEncoder(build_encoder(found, which), kind, found.step, which)


def encoder_of(
    task: Pretrain, modality: str, weights: Which, *, step: int = 0
) -> PretrainedEncoder:
    """The encoder of a task. The teacher's encoder has its averages, and the student's values in
    the parts that they share."""
    encoder = copy.deepcopy(task.student.encoder)
    if weights == "teacher":
        ours = dict(encoder.named_parameters())
        with torch.no_grad():
            for name, average in task.teacher.encoder.named_parameters():
                ours[name].copy_(average)
    return PretrainedEncoder(encoder, task.modalities[modality], step, weights)
