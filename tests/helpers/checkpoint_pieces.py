"""The state of a small run, whole or partitioned over ranks as the ZeRO stages partition it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2v_ds.checkpoint import Saver
from d2v_ds.checkpoint.format import EMA_KINDS, by_kind
from d2v_ds.checkpoint.write import build_manifest, publish, write_pieces
from d2v_ds.engine import EmaKind, Partition
from d2v_ds.run.run_folder import Generation, RunFolder

SHAPES: dict[str, tuple[int, ...]] = {
    "student.trunk.weight": (6, 5),
    "student.trunk.bias": (7,),
    "student.scale": (),
    "teacher.trunk.weight": (6, 5),
    "teacher.trunk.bias": (7,),
}
STUDENT = [name for name in SHAPES if name.startswith("student.")]
TEACHER = [name for name in SHAPES if name.startswith("teacher.")]
STATE = {"step": 7, "samples": 123, "cursor": {"epoch": 1, "step": 3}, "config": {"lr": 1e-3}}

Cuts = dict[str, list[int]]  # name -> ascending cut points, one fewer than ranks
Pieces = dict[str, tuple[int, Tensor]]


@dataclass
class Owned:
    """The partitions and EMA pieces of one rank."""

    partitions: dict[str, Partition]
    ema: dict[EmaKind, Pieces]


def numel(name: str) -> int:
    return math.prod(SHAPES[name])


def whole(seed: int) -> Owned:
    """The whole state on one rank, with random values. Adam step counts differ by parameter."""
    generator = torch.Generator().manual_seed(seed)

    def draw(name: str) -> Tensor:
        return torch.randn(numel(name), generator=generator)

    partitions = {
        name: Partition(0, draw(name), draw(name), draw(name), torch.tensor(float(seed + i)))
        for i, name in enumerate(STUDENT)
    }
    return Owned(
        partitions, {kind: {name: (0, draw(name)) for name in TEACHER} for kind in EMA_KINDS}
    )


def empty() -> Owned:
    """Like `whole`, but filled with NaN, as before a restore."""
    state = whole(0)
    for partition in state.partitions.values():
        for values in (
            partition.master,
            partition.exp_avg,
            partition.exp_avg_sq,
            partition.adam_step,
        ):
            values.fill_(math.nan)
    for pieces in state.ema.values():
        for _, values in pieces.values():
            values.fill_(math.nan)
    return state


def cut(state: Owned, cuts: Cuts, rank: int) -> Owned:
    """Live views of one rank's part of a whole state, without parameters whose part is empty."""
    partitions: dict[str, Partition] = {}
    ema: dict[EmaKind, Pieces] = {kind: {} for kind in EMA_KINDS}
    for name, partition in state.partitions.items():
        low, high = bounds(cuts, name, rank)
        if low < high:
            own = (v[low:high] for v in (partition.master, partition.exp_avg, partition.exp_avg_sq))
            partitions[name] = Partition(low, *own, partition.adam_step)
    for kind, pieces in state.ema.items():
        for name, (_, values) in pieces.items():
            low, high = bounds(cuts, name, rank)
            if low < high:
                ema[kind][name] = (low, values[low:high])
    return Owned(partitions, ema)


def bounds(cuts: Cuts, name: str, rank: int) -> tuple[int, int]:
    points = [0, *cuts[name], numel(name)]
    return points[rank], points[rank + 1]


def even_cuts(ranks: int) -> Cuts:
    """Cuts each parameter into equal parts, the last one shorter, as ZeRO 3 does."""
    return {
        name: [min(numel(name), -(-numel(name) // ranks) * r) for r in range(1, ranks)]
        for name in SHAPES
    }


def flat_cuts(ranks: int) -> Cuts:
    """Cuts one flat buffer of all parameters into equal parts, as ZeRO 1 and 2 do."""
    cuts: Cuts = {name: [] for name in SHAPES}
    for names in (STUDENT, TEACHER):
        partition = -(-sum(map(numel, names)) // ranks)
        start = 0
        for name in names:
            points = (partition * r - start for r in range(1, ranks))
            cuts[name] = [min(max(0, point), numel(name)) for point in points]
            start += numel(name)
    return cuts


def save(
    run: RunFolder,
    generation: Generation,
    step: int,
    own: Owned,
    keep: int = 9,
    *,
    keep_every: int = 0,
    replicated: bool = False,
) -> Path:
    """Saves one checkpoint and waits for it. Every rank calls this with its own state."""
    saver = Saver(run, generation, keep=keep, keep_every=keep_every, replicated=replicated)
    begin(saver, step, own)
    saver.finish()
    return run.checkpoint(step)


def begin(saver: Saver, step: int, own: Owned) -> None:
    saver.start(step, partitions=own.partitions, ema=own.ema, shapes=SHAPES, state=STATE)


def save_cut(
    run: RunFolder, generation: Generation, step: int, state: Owned, cuts: Cuts, ranks: int
) -> Path:
    """Saves like Saver, but the ranks take turns in this process."""
    aside = run.checkpoints / f".{step:08d}.{generation.number}.tmp"
    aside.mkdir(parents=True)
    owned = [cut(state, cuts, rank) for rank in range(ranks)]
    files = [write_pieces(aside, r, by_kind(o.partitions, o.ema)) for r, o in enumerate(owned)]
    steps = {name: int(partition.adam_step) for name, partition in state.partitions.items()}
    plan = {"step": step, "state": STATE, "shapes": SHAPES, "adam_steps": steps}
    return publish(run, generation, aside, build_manifest(plan, files))


def values_of(state: Owned) -> dict[str, Any]:
    """Every value by name, for bit-exact comparisons."""
    values: dict[str, Any] = {}
    for name, partition in state.partitions.items():
        for kind in ("master", "exp_avg", "exp_avg_sq"):
            values[f"{kind}/{name}"] = getattr(partition, kind).tolist()
        values[f"adam_step/{name}"] = partition.adam_step.item()
    for kind, pieces in state.ema.items():
        values |= {f"{kind}/{name}": v.tolist() for name, (_, v) in pieces.items()}
    return values


def tree(root: Path) -> dict[str, tuple[float, bytes]]:
    """Every file and folder below `root`, with its modification time and content."""
    return {
        str(path.relative_to(root)): (
            path.stat().st_mtime_ns,
            path.read_bytes() if path.is_file() else b"",
        )
        for path in sorted(root.rglob("*"))
    }
