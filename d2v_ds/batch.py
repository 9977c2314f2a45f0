"""Batch: the input of the model, with all indices computed on the CPU by the loader.

All counts are known on the host, so no boolean mask is turned into indices on the device. Row
b * M + m of a [B * M, ...] tensor is view m of sample b.

B samples, M masked views per sample, T tokens, K visible tokens per view, N masked tokens in the
batch, S raw audio samples.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """One micro-batch. Sets of tokens:

    valid     [B, T]  exist; the others are padding
    shown     [B, T]  reach the teacher
    seen      [R, T]  reach the student: exist and are not masked
    visible   [R, K]  the positions of the seen tokens, if masked tokens are removed
    masked    [N]     are to be predicted

    `exists` and `attended` derive the masks for convolutions and attention from them.
    """

    modality: str

    index: int
    """Number of the micro-batch in its step, from 0 over all ranks. Seeds dropout and noise."""

    inputs: Tensor
    """Input of the front end: waveforms [B, S], images [B, 3, h, w] or ids [B, T]. Shorter
    waveforms end in zeros, shorter texts in padding ids."""

    valid: Tensor | None
    """[B, T] bool: token t exists in sample b. None: all tokens exist."""

    seen: Tensor
    """[B * M, T] bool: the token exists and is not masked. If `padded`, padding is seen as well."""

    visible: Tensor | None
    """[B * M, K] int64: positions of the seen tokens, ascending. Rows with fewer than K are filled
    with T, one past the end. None: masked tokens are replaced instead of removed."""

    ragged: bool
    """Some rows of `visible` are filled."""

    masked: Tensor
    """[N] int64: indices into the flattened [B * M * T] of the tokens to predict."""

    keys: tuple[str, ...] = ()
    """Keys of the samples, for messages."""

    views: int = 1
    """M."""

    corrupted: Tensor | None = None
    """[B * M, T] ids that the student reads instead of `inputs`, for a modality that replaces
    masked tokens before the front end."""

    shown: Tensor | None = None
    """[B, T] bool: the part of `inputs` that the teacher sees. None: all of it."""

    labels: Tensor | None = None
    """What fine-tuning predicts: [B, C] fp32 probabilities of the classes, zeros for a sample that
    does not count; [B] fp32 numbers, NaN for one that does not count; or, with `label_lengths`, the
    ids of all transcripts after each other, [U] int64."""

    label_lengths: Tensor | None = None
    """[B] int64: the number of ids of each transcript; -1 for a sample that does not count."""

    channels: Tensor | None = None
    """[B, D] bool: the channels of the tokens that are not masked, in fine-tuning. None: all."""

    padded: bool = False
    """As in fairseq, only attention ignores padding; convolutions and statistics include it."""

    @property
    def terms(self) -> int:
        """The number of terms in the loss, by which a step's loss is divided: masked tokens, or
        samples if they have labels."""
        return len(self.masked) if self.labels is None else len(self.inputs)

    def exists(self) -> Tensor | None:
        """[B, T, 1] bool, False for padding that must be hidden; None if nothing is hidden."""
        return None if self.valid is None or self.padded else self.valid[:, :, None]

    def exists_views(self) -> Tensor | None:
        """`exists` per view, [B * M, T, 1]."""
        exists = self.exists()
        return None if exists is None else exists.repeat_interleave(self.views, dim=0)

    def attended(self) -> Tensor | None:
        """[B * M, K] bool, or [B * M, T] without `visible`: the student's tokens that exist; None
        if all do."""
        T = self.seen.shape[1]
        if self.visible is None:
            return None if self.valid is None else self.valid.repeat_interleave(self.views, dim=0)
        exists = self.visible < T if self.ragged else None
        if self.padded and self.valid is not None:
            valid = self.valid.repeat_interleave(self.views, dim=0)  # [B * M, T]
            kept = valid.gather(1, self.visible.clamp(max=T - 1))
            exists = kept if exists is None else kept & exists
        return exists

    def to(self, device: torch.device) -> Batch:
        """The batch with every tensor on `device`."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def copied(self) -> Batch:
        """The batch with every tensor copied to memory of its own, page-locked if there is a
        GPU."""
        return self._each(Tensor.pin_memory if torch.cuda.is_available() else Tensor.clone)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        changed: dict[str, Any] = {
            f.name: change(value)
            for f in dataclasses.fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        return dataclasses.replace(self, **changed)


@dataclass(frozen=True)
class StepBatch:
    """One optimizer step of one rank."""

    modality: str

    micro_batches: list[Batch]

    count: int
    """The terms of the loss in all micro-batches of all ranks: masked tokens, or samples if they
    have labels. The step's loss is divided by it."""

    samples: int
    """Samples in all micro-batches of all ranks."""

    units: float
    """Seconds of audio, images or tokens in all micro-batches of all ranks."""

    cursor: dict[str, Any]
    """State of the loader after this step, which a checkpoint stores."""

    source: str = ""
    """The source in the mixture (loader/mixture.py)."""

    bad: Mapping[str, int] = field(default_factory=dict)
    """{kind: number} of the bad samples that were replaced in this rank's micro-batches; the kinds
    are those of data/checks.py."""


def mask_indices(
    masks: Sequence[npt.NDArray[np.bool_]],
    *,
    removed: bool = True,
    valid: npt.NDArray[np.bool_] | None = None,
) -> dict[str, Any]:
    """The fields of a Batch that follow from the masks: valid, seen, visible, ragged, masked and
    padded.

    masks: one array [M, T_b] per sample, True where masked; T is the largest T_b. removed: the
    encoder's input omits masked tokens. valid [B, T]: if given, all masks have length T and include
    padding, and the batch is `padded`; valid is False for padding.
    """
    B, M, T = len(masks), masks[0].shape[0], max(mask.shape[1] for mask in masks)
    exists = np.zeros((B, T), dtype=bool)
    masked = np.zeros((B, M, T), dtype=bool)
    for b, mask in enumerate(masks):
        assert mask.shape[0] == M, f"sample {b} has {mask.shape[0]} views, the first has {M}"
        exists[b, : mask.shape[1]] = True
        masked[b, :, : mask.shape[1]] = mask
    seen = (exists[:, None] & ~masked).reshape(B * M, T)
    fields: dict[str, Any] = {"visible": None, "ragged": False}
    if removed:
        fields = visible_positions(seen)
    real = exists if valid is None else valid
    return fields | {
        "valid": None if real.all() else torch.from_numpy(real),
        "seen": torch.from_numpy(seen),
        "masked": torch.from_numpy(np.flatnonzero(masked.reshape(-1))),
        "padded": valid is not None,
    }


def visible_positions(seen: npt.NDArray[np.bool_]) -> dict[str, Any]:
    """`visible` and `ragged` of a Batch for seen [R, T]."""
    counts = seen.sum(1)
    visible = np.full((len(seen), int(counts.max())), seen.shape[1], dtype=np.int64)
    rows, positions = np.nonzero(seen)  # row-major: ascending within each row
    slots = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    visible[rows, slots] = positions
    return {
        "visible": torch.from_numpy(visible),
        "ragged": bool(counts.min() != counts.max()),
    }
