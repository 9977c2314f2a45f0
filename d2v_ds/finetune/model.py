"""A fine-tuned model as a plain torch module.

    run folder, checkpoint, exported folder ... --load_finetuned--> FinetunedModel
    examples --FinetunedModel--> logits        --predict--> transcripts, classes or numbers

B samples, T tokens, C outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from d2v_ds.config.decoding import decode
from d2v_ds.config.finetuning import FineTuning
from d2v_ds.encoder import check_examples, prepare_example
from d2v_ds.errors import UserError
from d2v_ds.finetune.labelled import Labelled
from d2v_ds.finetune.labels import LABELS_FILE, Classes, Transcripts
from d2v_ds.finetune.task import Finetune, lengths_of
from d2v_ds.modalities import create_modalities
from d2v_ds.transformer import TransformerConfig
from d2v_ds.weights import Weights, load_parameters, open_weights


class Logits(NamedTuple):
    """The output of a head for a padded batch, in fp32."""

    values: Tensor
    """[B, T, C] for transcripts, undefined for padding; else [B, C]."""

    lengths: Tensor
    """[B] int64: the number of tokens of each sample."""


class FinetunedModel(nn.Module):
    """Encoder and head for one modality, in evaluation mode and fp32.

    forward(examples) takes what PretrainedEncoder.forward takes; examples may differ in length, and
    padding does not influence the result.
    """

    def __init__(self, task: Finetune, step: int) -> None:
        super().__init__()
        self.task, self.step = task, step
        self.labels = task.labels
        self.modality: Labelled = task.held_out(task.name)
        self.eval()

    def prepare(self, raw: Any, *, rate: int | None = None) -> Any:
        """One example from a waveform, an image or token ids, as PretrainedEncoder.prepare. Raises
        UserError if the content does not fit the model."""
        return prepare_example(self.modality.base, raw, rate)

    def forward(self, examples: Sequence[Any]) -> Logits:
        check_examples(self.modality.base, examples)
        batch = self.modality.unmasked(examples).to(next(self.parameters()).device)
        return Logits(self.task.logits(batch), lengths_of(batch))

    @torch.no_grad()
    def predict(self, examples: Sequence[Any]) -> list[Any]:
        """The transcript (by greedy decoding), the class name or the number of each example."""
        values, lengths = self(examples)
        if isinstance(self.labels, Transcripts):
            best = values.argmax(-1).cpu().numpy()
            pairs = zip(best, lengths.tolist(), strict=True)
            return [self.labels.greedy(row[:T]) for row, T in pairs]
        if isinstance(self.labels, Classes):
            return [self.labels.names[i] for i in values.argmax(-1).tolist()]
        return [float(value) for value in values[:, 0]]


def load_finetuned(path: str | Path) -> FinetunedModel:
    """The fine-tuned model in a run folder (its newest valid checkpoint), a checkpoint, an exported
    folder, or a Hugging Face folder with a head. Raises UserError."""
    return finetuned(open_weights(path))


def finetuned(found: Weights) -> FinetunedModel:
    """As `load_finetuned`, for weights that are already open."""
    if not found.finetune:
        raise UserError(
            f"{found.path}: is a pre-trained encoder without a head; fine-tune it with "
            "`d2v-ds finetune`, or probe it with `d2v-ds evaluate knn`"
        )
    raw = dict(found.finetune)
    if LABELS_FILE in found.files:  # the copy that belongs to the weights
        raw["tokenizer"] = str(found.files[LABELS_FILE])
    settings = decode(FineTuning, raw, "finetune")
    [modality] = create_modalities(found.modality).values()
    task = Finetune(decode(TransformerConfig, found.model, "model"), modality, settings)
    encoder = {f"encoder.{name}": value for name, value in found.encoder().items()}
    values = {**encoder, **found.tensors("head")}
    load_parameters(task, values, found.path)
    return FinetunedModel(task, found.step)
