"""Batch: what the loader hands to the model, every index computed on the CPU.

B samples, M masked views a sample, T tokens, K visible tokens of a view, N masked tokens in the
batch. Row b * M + m of a [B * M, ...] tensor is view m of sample b. All counts are known on the
host, so no boolean mask is ever turned into indices on the device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    modality: str
    index: int  # of this micro-batch among all of its step: seeds dropout and noise
    inputs: Tensor  # what the front end takes; speech: waveforms [B, S], zeros after the end
    valid: Tensor | None  # [B, T] bool: token t exists in sample b; None: all of them do
    seen: Tensor  # [B * M, T] bool: exists and is not masked
    visible: Tensor  # [B * M, K] int64: positions of the seen tokens, ascending; rows with fewer
    # than K are filled with T, one past the end
    ragged: bool  # some row of `visible` is filled
    masked: Tensor  # [N] int64: positions in the flattened [B * M * T] that are to be predicted
    keys: tuple[str, ...] = ()  # of the samples, for messages
    views: int = 1  # M

    def valid_views(self) -> Tensor | None:
        """`valid` for every view, [B * M, T, 1]; None when all tokens exist."""
        if self.valid is None:
            return None
        return self.valid.repeat_interleave(self.views, dim=0)[:, :, None]

    def to(self, device: torch.device) -> Batch:
        """Every tensor on `device`."""
        moved = {
            f.name: value.to(device, non_blocking=True)
            for f in dataclasses.fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        return dataclasses.replace(self, **moved)

    def pin_memory(self) -> Batch:
        """Called by torch's DataLoader."""
        pinned = {
            f.name: value.pin_memory()
            for f in dataclasses.fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        return dataclasses.replace(self, **pinned)


@dataclass(frozen=True)
class StepBatch:
    """One optimizer step of one rank."""

    modality: str
    micro_batches: list[Batch]
    masked_count: int  # masked tokens in all micro-batches of all ranks
    samples: int  # samples in all micro-batches of all ranks
    units: float  # seconds of audio, images or tokens in all of them
    position: dict[str, int]  # the loader's state after this step: what a checkpoint keeps


def mask_indices(masks: Sequence[npt.NDArray[np.bool_]]) -> dict[str, Tensor | bool | None]:
    """The fields of a Batch that follow from the masks: valid, seen, visible, ragged, masked.

    masks: one [M, T_b] array a sample, True where masked; T is the largest T_b.
    """
    B, M, T = len(masks), masks[0].shape[0], max(mask.shape[1] for mask in masks)
    valid = np.zeros((B, T), dtype=bool)
    masked = np.zeros((B, M, T), dtype=bool)
    for b, mask in enumerate(masks):
        assert mask.shape[0] == M, f"sample {b} has {mask.shape[0]} views, the first has {M}"
        valid[b, : mask.shape[1]] = True
        masked[b, :, : mask.shape[1]] = mask
    seen = (valid[:, None] & ~masked).reshape(B * M, T)
    counts = seen.sum(1)
    visible = np.full((B * M, int(counts.max())), T, dtype=np.int64)
    rows, positions = np.nonzero(seen)  # row-major: ascending within each row
    slots = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    visible[rows, slots] = positions
    return {
        "valid": None if valid.all() else torch.from_numpy(valid),
        "seen": torch.from_numpy(seen),
        "visible": torch.from_numpy(visible),
        "ragged": bool(counts.min() != counts.max()),
        "masked": torch.from_numpy(np.flatnonzero(masked.reshape(-1))),
    }
