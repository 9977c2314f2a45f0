"""A pre-trained encoder as a plain torch module.

    everything that open_weights opens --load_encoder--> PretrainedEncoder
    waveforms, images, token ids --prepare--> examples --forward--> features of every block

Needs neither DeepSpeed nor the data that the model was trained on.

B samples, S raw audio samples, T tokens, D width, L blocks.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from d2v_ds.errors import UserError
from d2v_ds.modalities import create_modalities
from d2v_ds.modalities.base import Modality
from d2v_ds.pretrain import Pretrain
from d2v_ds.student import Encoder
from d2v_ds.weights import Weights, Which, build_encoder, open_weights

BATCH = 16  # examples in one forward pass


class EncoderOutput(NamedTuple):
    """Features of a padded batch."""

    blocks: list[Tensor]
    """The output of each of the L blocks, [B, T, D]; undefined for padding. In post-norm models it
    is normalised, in pre-norm models it is the residual stream. Extra tokens (the class token) are
    not included. The trunk's final norm, if there is one, is not applied: it belongs to the
    pre-training head, as in BEiT."""

    valid: Tensor | None
    """[B, T] bool: which tokens exist; None if all of them do."""

    def pooled(self, layer: int) -> Tensor:
        """The mean over the tokens that exist of block `layer`, counted from 1: [B, D], fp32.

        Raises UserError if there is no such block."""
        if not 1 <= layer <= len(self.blocks):
            raise UserError(f"layer: the encoder has blocks 1 to {len(self.blocks)}, got {layer}")
        block = self.blocks[layer - 1].float()
        if self.valid is None:
            return block.mean(1)
        weight = self.valid[:, :, None]
        return block.where(weight, 0.0).sum(1) / weight.sum(1)


class PretrainedEncoder(nn.Module):
    """Front end and trunk for one modality, without masks.

    It is created in evaluation mode, in fp32 and on the CPU; `.to("cuda")` moves it, and inputs
    follow. All parameters are trainable: `train()` turns on dropout and LayerDrop for fine-tuning,
    `requires_grad_(False)` freezes the model.

        examples = [encoder.prepare(waveform, rate=16_000) for waveform in waveforms]
        blocks, valid = encoder(examples)
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

    def prepare(self, raw: Any, *, rate: int | None = None) -> Any:
        """One example of forward's list from raw content; equal to what `modality.decode` gives for
        the same content in a shard.

        speech: a waveform [S], floats in [-1, 1] or int16, as numpy or torch, with its `rate`, the
        model's sample rate; or the path or bytes of a recording. The result is normalised to mean 0
        and variance 1.
        vision: a Pillow image, uint8 pixels [h, w, 3] or [3, h, w], or the path or bytes of an
        image file. The result is the central crop.
        text: token ids of the tokenizer of the training data, with its special ids.

        Raises UserError if the content does not fit the model.
        """
        return prepare_example(self.modality, raw, rate)

    def forward(self, examples: Sequence[Any]) -> EncoderOutput:
        """Features of a list of B examples, as `prepare`, `modality.decode(members, None)` and
        `d2v_ds.webdataset` return them: normalised waveforms float32 [S], pixels uint8 [3, h, w],
        token ids int64 [T].

        Examples may differ in length. They are padded into one batch, and padding does not
        influence the features, so a batch gives what its examples give one by one (up to rounding).
        T is the number of tokens of the longest example: a speech model makes one token of 20 ms of
        audio, a vision model one of each patch, row by row, a text model one of each id.

        The forward pass runs on the device of the parameters and under the caller's autocast and
        no_grad. Raises UserError for an empty list or an example that does not fit the model.
        """
        check_examples(self.modality, examples)
        batch = self.modality.unmasked(examples).to(next(self.parameters()).device)
        tokens = self.encoder.features(batch)
        _, _, layers = self.encoder.whole(batch, tokens, collect=self.depth)
        return EncoderOutput([block for _, block in layers], batch.valid)

    @torch.no_grad()
    def encode(
        self, examples: Sequence[Any], batch: int = BATCH
    ) -> Iterator[tuple[list[int], EncoderOutput]]:
        """Encodes any number of examples, `batch` at a time and those of similar size together:
        yields the indices of some examples and their features. Evaluation mode must be on."""
        assert not self.training, "call eval() first"
        by_size = sorted(range(len(examples)), key=lambda i: int(np.size(examples[i])))
        for start in range(0, len(by_size), batch):
            group = by_size[start : start + batch]
            yield group, self([examples[i] for i in group])


def prepare_example(modality: Modality, raw: Any, rate: int | None) -> Any:
    """One example from raw content. Raises UserError if the content does not fit the model."""
    try:
        example = modality.prepare(raw, rate=rate)
        modality.check_example(example)
    except OSError as error:
        raise UserError(f"{error.filename or raw}: cannot be read ({error.strerror})") from None
    except (ValueError, TypeError) as error:
        raise UserError(f"the input {error}") from None
    return example


def check_examples(modality: Modality, examples: Sequence[Any]) -> None:
    """Raises UserError for an empty list or an example that does not fit the model."""
    listed = hasattr(examples, "__len__") and not isinstance(examples, str | bytes)
    if not listed or not len(examples):
        raise UserError("the model takes a list of at least one example")
    for i, example in enumerate(examples):
        try:
            modality.check_example(example)
        except ValueError as error:
            raise UserError(f"example {i} {error}; `prepare` makes examples") from None


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


def best_device(local_rank: int = 0) -> torch.device:
    """The GPU of a rank of this machine, or the CPU if there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", local_rank % torch.cuda.device_count())


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
