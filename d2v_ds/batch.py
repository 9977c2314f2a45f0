"""Batch: what the loader hands to the model, every index computed on the CPU.

B samples, M masked views a sample, T tokens, K visible tokens of a view, N masked tokens in the
batch. Row b * M + m of a [B * M, ...] tensor is view m of sample b. All counts are known on the
host, so no boolean mask is ever turned into indices on the device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    modality: str
    index: int  # of this micro-batch among all of its step: seeds dropout and noise
    inputs: Tensor  # what the front end takes: waveforms [B, S], images [B, 3, h, w], ids [B, T];
    # zeros after the end of a waveform, padding ids after that of a text
    valid: Tensor | None  # [B, T] bool: token t exists in sample b; None: all of them do
    seen: Tensor  # [B * M, T] bool: exists and is not masked
    visible: Tensor | None  # [B * M, K] int64: positions of the seen tokens, ascending; rows with
    # fewer than K are filled with T, one past the end. None: masked tokens are not taken out but
    # replaced, and all T stay in place
    ragged: bool  # some row of `visible` is filled
    masked: Tensor  # [N] int64: positions in the flattened [B * M * T] that are to be predicted
    keys: tuple[str, ...] = ()  # of the samples, for messages
    views: int = 1  # M
    corrupted: Tensor | None = None  # [B * M, T] ids that the student reads in place of `inputs`,
    # where masked tokens are replaced before the front end
    shown: Tensor | None = None  # [B, T] bool: what of `inputs` the teacher sees; None: all
    padded: bool = False  # as in fairseq, attention alone knows of padding: convolutions and
    # statistics take it for tokens

    def exists(self) -> Tensor | None:
        """[B, T, 1] bool for what must not see padding; None when there is nothing to hide."""
        return None if self.valid is None or self.padded else self.valid[:, :, None]

    def exists_views(self) -> Tensor | None:
        """`exists` for every view, [B * M, T, 1]."""
        exists = self.exists()
        return None if exists is None else exists.repeat_interleave(self.views, dim=0)

    def attended(self) -> Tensor | None:
        """Which of the student's tokens exist, [B * M, K] bool; None: all of them."""
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
        """Every tensor on `device`."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def own(self) -> Batch:
        """Every tensor in memory of its own; page-locked where a GPU will fetch it."""
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
    count: int  # what the step's loss is divided by: masked tokens of all micro-batches and ranks
    samples: int  # samples in all micro-batches of all ranks
    units: float  # seconds of audio, images or tokens in all of them
    cursor: dict[str, Any]  # where the loader stands after this step: what a checkpoint keeps
    source: str = ""  # of the mixture (loader/mixture.py)
    bad: int = 0  # samples of this rank's micro-batches that others stand in for


def mask_indices(
    masks: Sequence[npt.NDArray[np.bool_]],
    *,
    removed: bool = True,
    valid: npt.NDArray[np.bool_] | None = None,
) -> dict[str, Any]:
    """The fields of a Batch that follow from the masks: valid, seen, visible, ragged, masked, and
    padded.

    masks: one [M, T_b] array a sample, True where masked; T is the largest T_b. removed: the
    encoder does without masked tokens. valid [B, T]: given, the masks are of one length and take
    in the padding, which this tells from tokens (Batch.padded).
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
    shown = exists if valid is None else valid
    return fields | {
        "valid": None if shown.all() else torch.from_numpy(shown),
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
