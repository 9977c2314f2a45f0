"""Which rank owns which part of which parameter, and a frozen module with the same layout.

    own extents --gather_layout--> [R, P, 3] on every rank --check_layout--> covered exactly once
    fp32 values that this rank owns --FlatCopy--> a frozen module, whole on every rank

R ranks, P parameters.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from d2v_ds.engine import Pieces

Extent = tuple[int, int, int]  # (offset in the parameter, length, start in the flat master)

# torch renamed it; the old name still works but warns
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def gather_layout(names: Iterable[str], own: Mapping[str, Extent], device: torch.device) -> Tensor:
    """[R, P, 3] int64 on the host: each rank's extent of each of `names`, zeros if it owns nothing.
    Collective: all ranks must call it with the same names."""
    rows = [own.get(name, (0, 0, 0)) for name in names]
    mine = torch.tensor(rows, dtype=torch.int64, device=device)  # [P, 3]
    gathered = mine.new_empty(dist.get_world_size() * len(mine), 3)
    all_gather(gathered, mine)
    return gathered.view(-1, *mine.shape).cpu()


def check_layout(layout: Tensor, lengths: Mapping[str, int], replicated: bool) -> None:
    """Asserts that the ranks' extents, [R, P, 3], cover every parameter exactly once, or that every
    rank has it whole."""
    for i, (name, length) in enumerate(lengths.items()):
        pieces = [(o, n) for o, n, _ in layout[:, i].tolist() if n > 0]
        if replicated:
            assert pieces == [(0, length)] * len(layout), f"{name} is not whole on every rank"
            continue
        end = 0
        for offset, count in sorted(pieces):
            assert offset == end, f"{name}: element {min(offset, end)} has no owner, or several"
            end = offset + count
        assert end == length, f"{name}: {end} of {length} elements have an owner"


def signature(pieces: Tensor) -> tuple[int, ...]:
    """(offset, length) of each rank's extent, from [R, 3]."""
    return tuple(pieces[:, :2].flatten().tolist())


class FlatCopy:
    """Stages 1 and 2: a frozen module whose parameters are views of flat buffers, partitioned over
    the ranks like the masters, so that one all-gather per group updates it."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._buffers: dict[int, Tensor] = {}  # by optimizer group, [R * partition]
        self._own: dict[str, Tensor] = {}  # views that take this rank's values

    def place(
        self,
        name: str,
        parameter: nn.Parameter,
        group: int,
        size: int,
        start: int,
        own: Extent | None,
    ) -> None:
        """Moves `parameter` to element `start` of its group's buffer of `size` elements; own: this
        rank's extent of it."""
        if group not in self._buffers:
            self._buffers[group] = parameter.new_zeros(size)
        view = self._buffers[group][start : start + parameter.numel()]
        view.copy_(parameter.view(-1))
        parameter.data = view.view_as(parameter)
        if own is not None:
            self._own[name] = view[own[0] : own[0] + own[1]]

    def publish(self, values: Pieces) -> None:
        assert values.keys() == self._own.keys(), "not the parameters of the first publication"
        if values:
            torch._foreach_copy_(
                [self._own[name] for name in values], [value for _, value in values.values()]
            )
        for _, buffer in sorted(self._buffers.items()):
            chunks = buffer.view(dist.get_world_size(), -1)
            all_gather(buffer, chunks[self._rank])
