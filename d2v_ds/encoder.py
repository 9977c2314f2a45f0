"""A pre-trained encoder as a plain torch module.

    run folder or checkpoint --load_encoder--> PretrainedEncoder
    examples --PretrainedEncoder--> features of every block, [B, T, D] each

Needs neither DeepSpeed nor the data that the run was trained on.

B samples, T tokens, D width, L blocks.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from d2v_ds.checkpoint import Checkpoint, newest_verified, open_checkpoint
from d2v_ds.config import Config
from d2v_ds.config.decoding import decode
from d2v_ds.errors import UserError
from d2v_ds.modalities.base import Modality
from d2v_ds.pretrain import Pretrain
from d2v_ds.run.run_folder import RunFolder
from d2v_ds.student import Encoder

Weights = Literal["student", "teacher"]


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

    def __init__(self, encoder: Encoder, modality: Modality, step: int, weights: Weights) -> None:
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
    path: str | Path, *, weights: Weights = "student", modality: str = ""
) -> PretrainedEncoder:
    """The encoder in a run folder (its newest valid checkpoint) or in one checkpoint's folder.

    weights: the student's or the teacher's. modality: required for a run with several; "": the only
    one. Raises UserError if there is no checkpoint, or if the modality must be named.
    """
    found = open_newest(Path(path))
    config = decode(Config, found.state["config"])
    name = only_modality(config, modality)
    task = Pretrain.create(config)
    load_weights(task, found)
    return encoder_of(task, name, weights, step=found.step)


def encoder_of(
    task: Pretrain, modality: str, weights: Weights, *, step: int = 0
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


def open_newest(path: Path) -> Checkpoint:
    """The checkpoint in `path`: the newest valid one of a run folder, or a checkpoint's own folder.
    Raises UserError."""
    if (path / "manifest.json").is_file():
        return open_checkpoint(path)
    found = newest_verified(RunFolder(path))
    if found is None:
        raise UserError(f"{path}: neither a checkpoint nor a run folder with a checkpoint")
    return found


def only_modality(config: Config, wanted: str = "") -> str:
    """The modality that was asked for, or the run's only one. Raises UserError."""
    names = sorted(config.modality)
    if not wanted and len(names) == 1:
        return names[0]
    if wanted not in names:
        given = f"no {wanted!r} in this run" if wanted else "this run has several; name one"
        raise UserError(f"modality: {given} (it has: {', '.join(names)})")
    return wanted


@torch.no_grad()
def load_weights(task: Pretrain, found: Checkpoint) -> None:
    """Loads the weights of student and teacher from the checkpoint, in fp32."""
    values = {**found.tensors("master"), **found.tensors("ema")}
    for name, parameter in task.named_parameters():
        parameter.copy_(values[name])
