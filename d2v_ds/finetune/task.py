"""Fine-tuning as a task: encoder, head, loss, and the outcomes of a validation.

    inputs --features--> tokens --time and channel masks--> encoder --> head --> logits --> loss

B samples, T tokens, D width, L blocks, C outputs of the head.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from d2v_ds.batch import Batch
from d2v_ds.config import Config
from d2v_ds.config.decoding import decode
from d2v_ds.config.finetuning import FineTuning
from d2v_ds.errors import UserError
from d2v_ds.finetune.heads import HEADS, HeadKind
from d2v_ds.finetune.labelled import Labelled
from d2v_ds.finetune.labels import Classes, Transcripts
from d2v_ds.finetune.report import FinetuneReport, best_classes, score
from d2v_ds.finetune.settings import create_labels, resolve
from d2v_ds.modalities import create_modalities
from d2v_ds.modalities.base import Modality
from d2v_ds.modalities.speech import Speech
from d2v_ds.student import Encoder, mask_noise
from d2v_ds.task import Task
from d2v_ds.transformer import TransformerConfig

NOISE = 0.01  # standard deviation of what replaces masked tokens (fairseq mask_noise_std)


class Finetune(Task):
    """An encoder with a head for one modality."""

    def __init__(self, model: TransformerConfig, modality: Modality, settings: FineTuning) -> None:
        super().__init__()
        self.finetuning, self.name, self.depth = settings, modality.name, model.depth
        self.front = f"encoder.front_ends.{self.name}."
        self.labels = create_labels(settings)
        whole = modality
        if isinstance(modality, Speech):
            whole = modality.uncropped(settings.max_seconds)
        train, held_out = (
            Labelled(base, settings, self.labels, model.dim, training=training)
            for base, training in (
                (whole if settings.task == "ctc" else modality, True),
                (whole, False),
            )
        )
        self.modalities = {self.name: train}
        self._held_out = held_out
        self.report = FinetuneReport()
        self.encoder = Encoder(model, {self.name: modality.front_end(model)})
        head = HEADS[head_kind(self.name, settings)]
        self.head = head(
            model.dim,
            len(self.labels.names),
            std=settings.head_std,
            dropout=settings.head_dropout,
        )
        self._encoder_frozen = False

    @classmethod
    def create(cls, config: Config) -> Finetune:
        """Raises UserError for settings that do not fit each other."""
        model = decode(TransformerConfig, config.model, "model")
        [modality] = create_modalities(config.modality).values()
        settings = config.finetune
        if not settings.labels:
            raise UserError("finetune.labels: the training set has no labels")
        token = settings.time_mask and settings.time_mask_with == "token"
        if token and modality.front_end(model).mask_token is None:
            raise UserError(
                "finetune.time_mask_with: this encoder has no mask token; use noise or zero"
            )
        if (settings.time_mask or settings.channel_mask) and modality.name != "speech":
            raise UserError("finetune.time_mask and finetune.channel_mask are for speech only")
        if settings.freeze_blocks > model.depth:
            raise UserError(
                f"finetune.freeze_blocks: {settings.freeze_blocks} exceeds the model's "
                f"{model.depth} blocks"
            )
        return cls(model, modality, settings)

    resolve = staticmethod(resolve)

    # ---------------------------------------------------------------------------------- the model

    def forward(self, batch: Batch, count: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The batch's share of the step's loss, and sums for the report. count: samples of the
        whole step. In evaluation mode the sums also have what `outcomes` needs."""
        logits = self.logits(batch)
        losses = self.losses(logits, batch)  # [B]
        loss = losses.sum() / count
        sums = {"loss": loss.detach()}
        if isinstance(self.labels, Transcripts):
            sums["impossible"] = impossible(batch).sum().float()
        if not self.training:
            sums["logits"] = logits.detach()
        return loss, sums

    def logits(self, batch: Batch) -> Tensor:
        """Logits in fp32, [B, T, C] for transcripts, else [B, C]."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self._encoder_frozen):
            tokens = self.masked(batch, self.encoder.features(batch))
            _, _, [(_, x)] = self.encoder.whole(batch, tokens, collect=1)
        # The last block's output: a pre-norm trunk's own norm is replaced by that of the head.
        return self.head(x, batch.valid).float()  # type: ignore[no-any-return]

    def masked(self, batch: Batch, tokens: Tensor) -> Tensor:
        """Tokens [B, T, D] with the front end's dropout and the masks of the batch; unchanged in
        evaluation mode."""
        if not self.training:
            return tokens
        settings, tokens = self.finetuning, self.encoder.front_end(self.name).dropout(tokens)
        if settings.time_mask:
            seen = batch.seen[:, :, None]
            if settings.time_mask_with == "token":
                mask_token = self.encoder.front_end(self.name).mask_token
                assert mask_token is not None, "checked by create"
                tokens = mask_token(tokens, batch.seen)
            elif settings.time_mask_with == "noise":
                B, T, D = tokens.shape
                noise = mask_noise(B * T, D, NOISE, tokens).view(B, T, D)
                tokens = torch.where(seen, tokens, noise)
            else:
                tokens = tokens * seen
        return tokens if batch.channels is None else tokens * batch.channels[:, None]

    def losses(self, logits: Tensor, batch: Batch) -> Tensor:
        """The loss of each sample, [B] in fp32; 0 for one that does not count."""
        labels = batch.labels
        assert labels is not None, "a batch without labels"
        if batch.label_lengths is not None:
            lengths = batch.label_lengths
            losses = F.ctc_loss(
                logits.log_softmax(-1).transpose(0, 1),
                labels,
                lengths_of(batch),
                lengths.clamp(min=0),
                reduction="none",
                zero_infinity=True,  # transcripts longer than their recordings
            )
            return torch.where(lengths >= 0, losses, torch.zeros_like(losses))
        if isinstance(self.labels, Classes):
            smoothing = self.finetuning.label_smoothing if self.training else 0.0
            share = labels.sum(1, keepdim=True)  # 0 for a sample that does not count
            target = (1 - smoothing) * labels + smoothing * share / labels.shape[1]
            return -(target * logits.log_softmax(-1)).sum(1)
        error = (logits[:, 0] - torch.nan_to_num(labels)).square()
        return torch.where(labels.isnan(), torch.zeros_like(error), error)

    # ----------------------------------------------------------------------------- what is trained

    def begin_step(self, step: int, modality: str) -> str:
        """Freezes what this step does not train."""
        for name, parameter in self.named_parameters():
            if parameter.requires_grad and self.part(name) == "frozen":
                parameter.requires_grad_(False)
        self._encoder_frozen = step < self.finetuning.freeze_steps
        return "head" if self._encoder_frozen else modality

    def part(self, name: str) -> str:
        """ "" for the head, which every step trains; "frozen" for what no step trains."""
        if name.startswith("head."):
            return ""
        return "frozen" if self.is_frozen(name) else self.name

    def is_frozen(self, name: str) -> bool:
        """Whether a parameter of the encoder is never trained, also because nothing reads it."""
        settings, front = self.finetuning, self.front
        unread = name.startswith("encoder.trunk.norm.")
        if name.startswith(f"{front}mask_token."):
            unread = not (settings.time_mask and settings.time_mask_with == "token")
        prefixes = {
            "nothing": (),
            "convolutions": (f"{front}features.convs.", f"{front}features.norms."),
            "features": (f"{front}features.",),
            "front_end": (front,),
            "encoder": ("encoder.",),
        }[settings.freeze]
        blocks = tuple(f"encoder.trunk.blocks.{i}." for i in range(settings.freeze_blocks))
        return unread or name.startswith((*prefixes, *blocks))

    def lr_scale(self, name: str) -> float:
        settings = self.finetuning
        if name.startswith("head."):
            return settings.head_lr
        if name.startswith("encoder.trunk.blocks."):
            return settings.layer_decay ** (self.depth - int(name.split(".")[3]))
        if not settings.layer_decay_front_end or name.startswith(f"{self.front}bias."):
            return 1.0  # BEiT leaves a position bias that all blocks share
        return settings.layer_decay ** (self.depth + 1)

    # ----------------------------------------------------------------------------------- validation

    @property
    def metric(self) -> str:
        return self.finetuning.metric

    def held_out(self, modality: str) -> Labelled:
        return self._held_out

    def outcomes(self, batch: Batch, sums: dict[str, Tensor]) -> list[Any]:
        """(prediction, reference) of each sample that counts: transcripts, class numbers with the
        five best, or numbers."""
        logits, labels = sums.pop("logits"), batch.labels
        assert labels is not None, "a batch without labels"
        if isinstance(self.labels, Transcripts):
            return self._transcripts(batch, logits)
        if isinstance(self.labels, Classes):
            counted = labels.sum(1).tolist()
            pairs = zip(best_classes(logits), labels.argmax(1).tolist(), counted, strict=True)
            return [(five, label) for five, label, counts in pairs if counts]
        pairs_ = zip(logits[:, 0].tolist(), labels.tolist(), strict=True)
        return [(value, label) for value, label in pairs_ if not np.isnan(label)]

    def _transcripts(self, batch: Batch, logits: Tensor) -> list[tuple[str, str]]:
        assert isinstance(self.labels, Transcripts) and batch.label_lengths is not None
        assert batch.labels is not None
        lengths, sizes = lengths_of(batch).tolist(), batch.label_lengths.tolist()
        ids = torch.split(batch.labels, [max(0, size) for size in sizes])
        return [
            (self.labels.greedy(best[:T].cpu().numpy()), self.labels.decode(own.tolist()))
            for best, T, own, size in zip(logits.argmax(-1), lengths, ids, sizes, strict=True)
            if size >= 0
        ]

    def score(self, outcomes: list[Any]) -> dict[str, float]:
        if not outcomes:
            return {}
        given, wanted = zip(*outcomes, strict=True)
        return score(self.finetuning.metric, given, wanted)


def head_kind(modality: str, settings: FineTuning) -> HeadKind:
    """The head of a task."""
    if settings.task == "ctc":
        return "ctc"
    if settings.pool == "auto":
        return "first" if modality == "text" else "mean"
    return settings.pool


def lengths_of(batch: Batch) -> Tensor:
    """The number of tokens of each sample, [B]."""
    B, T = batch.seen.shape
    if batch.valid is None:
        return torch.full((B,), T, dtype=torch.int64, device=batch.seen.device)
    return batch.valid.sum(1)


def impossible(batch: Batch) -> Tensor:
    """[B] bool: transcripts with more symbols than the recording has tokens, which CTC cannot
    produce. They add nothing to the loss."""
    assert batch.label_lengths is not None
    return batch.label_lengths > lengths_of(batch)
