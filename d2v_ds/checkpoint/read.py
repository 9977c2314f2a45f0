"""Loading: finds the newest valid checkpoint and reads the pieces that this rank owns from it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from d2v_ds.checkpoint.format import (
    FORMAT,
    KINDS,
    DamagedCheckpoint,
    EmaPieces,
    Files,
    PieceTable,
    Shapes,
    StateKind,
    by_kind,
    piece_table,
)
from d2v_ds.distributed.collectives import on_all_ranks, on_rank_0, own_rank, rank_count
from d2v_ds.engine import Partition
from d2v_ds.errors import UserError
from d2v_ds.files import sha256
from d2v_ds.records import is_step
from d2v_ds.run.run_folder import RunFolder

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint, opened: its manifest is in memory, its tensors are not."""

    path: Path
    step: int
    state: Mapping[str, Any]
    versions: Mapping[str, str]
    shapes: Shapes
    adam_steps: Mapping[str, int]
    files: Files
    pieces: PieceTable

    def verify(self, rank: int = 0, ranks: int = 1) -> None:
        """Reads every `ranks`-th file, starting with number `rank`. Raises DamagedCheckpoint."""
        for name, entry in list(self.files.items())[rank::ranks]:
            path = self.path / name
            if not path.is_file():
                raise DamagedCheckpoint(f"{path}: missing")
            if (size := path.stat().st_size) != entry["bytes"]:
                raise DamagedCheckpoint(
                    f"{path}: has {size} bytes, but {entry['bytes']} were written"
                )
            if sha256(path) != entry["sha256"]:
                raise DamagedCheckpoint(f"{path}: its SHA-256 differs from what was written")

    def restore(self, partitions: Mapping[str, Partition], ema: EmaPieces, shapes: Shapes) -> None:
        """Reads the pieces that this rank owns into its partitions and averages, in place, for any
        ZeRO stage and number of ranks that wrote the checkpoint.

        shapes: every parameter of this run's task, as given to `Saver.start`. Raises UserError,
        before anything is written, if names or shapes differ from the checkpoint's. The caller
        then refreshes its low-precision copies: engine.refresh().
        """
        self._refuse_other_model(shapes)
        wanted = by_kind(partitions, ema)
        for kind, pieces in wanted.items():
            for name in pieces:
                assert name in self.pieces[kind], f"{name}: {self.path} has no {kind} of it"
        written: dict[int, tuple[str, int]] = {}  # parameters of a group may share a step
        for name, partition in partitions.items():
            first, step = written.setdefault(id(partition.adam_step), (name, self.adam_steps[name]))
            assert step == self.adam_steps[name], (
                f"{name} and {first} share an Adam step here but not in {self.path}"
            )
        with torch.no_grad(), self._reader() as read:
            for kind, pieces in wanted.items():
                for name, (offset, values) in pieces.items():
                    read(kind, name, offset, values)
            for name, partition in partitions.items():
                partition.adam_step.fill_(self.adam_steps[name])

    def tensors(self, kind: StateKind) -> dict[str, Tensor]:
        """{parameter name: whole fp32 tensor on the CPU}: `master` for the student's weights,
        `ema` for the teacher's."""
        whole = {}
        with self._reader() as read:
            for name in self.pieces[kind]:
                values = torch.empty(self.shapes[name]).flatten()
                read(kind, name, 0, values)
                whole[name] = values.view(self.shapes[name])
        return whole

    @contextlib.contextmanager
    def _reader(self) -> Iterator[Callable[[StateKind, str, int, Tensor], None]]:
        """read(kind, name, offset, into): fills `into` with the elements from `offset` on. Files
        are memory-mapped, and only files with the required pieces are opened."""
        with contextlib.ExitStack() as stack:
            opened: dict[str, Any] = {}

            def read(kind: StateKind, name: str, offset: int, into: Tensor) -> None:
                end = offset + into.numel()
                filled = 0
                for start, length, file in self.pieces[kind][name]:
                    low, high = max(offset, start), min(end, start + length)
                    if low >= high:
                        continue
                    try:
                        if file not in opened:
                            opened[file] = stack.enter_context(safe_open(self.path / file, "pt"))
                        stored = opened[file].get_slice(f"{kind}/{name}")
                        values = stored[low - start : high - start]
                    except (SafetensorError, OSError) as error:
                        raise DamagedCheckpoint(f"{self.path / file}: {error}") from None
                    if values.shape != (high - low,):
                        raise DamagedCheckpoint(f"{self.path / file}: {kind} of {name} is cut")
                    into[low - offset : high - offset].copy_(values)
                    filled += high - low
                if filled != into.numel():
                    raise DamagedCheckpoint(
                        f"{self.path}: has {filled} of the elements {offset} to {end} of {name}"
                    )

            yield read

    def _refuse_other_model(self, shapes: Shapes) -> None:
        differing = []
        for name in [*self.shapes, *(name for name in shapes if name not in self.shapes)]:
            was, now = self.shapes.get(name), shapes.get(name)
            if was is None:
                differing.append(f"without {name}, which this run has")
            elif now is None:
                differing.append(f"with {name}, which this run lacks")
            elif was != tuple(now):
                differing.append(f"with {name} of shape {list(was)}, but this run has {list(now)}")
        if differing:
            more = f" ({len(differing)} parameters differ in total)" if len(differing) > 1 else ""
            raise UserError(
                f"checkpoint {self.step} was written {differing[0]}{more}. Resuming needs the same "
                "model; choose another run.dir."
            )


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in the folder `path`. Its tensors are neither read nor verified yet.

    Raises DamagedCheckpoint if it is incomplete, UserError if its format version differs.
    """
    if not path.is_dir():
        raise UserError(f"{path}: no such checkpoint")
    for name in ("COMPLETE", "manifest.json"):
        if not (path / name).is_file():
            raise DamagedCheckpoint(f"{path / name}: missing, so the checkpoint is incomplete")
    text = (path / "manifest.json").read_bytes()
    if hashlib.sha256(text).hexdigest() != (path / "COMPLETE").read_text(errors="replace").strip():
        raise DamagedCheckpoint(
            f"{path / 'manifest.json'}: its SHA-256 differs from that in COMPLETE"
        )
    try:
        manifest = json.loads(text)
    except (ValueError, RecursionError):
        raise DamagedCheckpoint(f"{path / 'manifest.json'}: not JSON") from None
    if not isinstance(manifest, dict) or "format" not in manifest:
        raise DamagedCheckpoint(f"{path / 'manifest.json'}: not a manifest")
    if manifest["format"] != FORMAT:
        versions = manifest.get("versions")
        wrote = versions.get("d2v-ds", "unknown") if isinstance(versions, dict) else "unknown"
        raise UserError(
            f"{path}: has checkpoint format {manifest['format']!r}, but this d2v_ds reads "
            f"{FORMAT}; use the d2v_ds that wrote it ({wrote})"
        )
    if problem := _problem(manifest):
        raise DamagedCheckpoint(f"{path / 'manifest.json'}: {problem}")
    return Checkpoint(
        path=path,
        step=manifest["step"],
        state=manifest["state"],
        versions=manifest["versions"],
        shapes={name: tuple(shape) for name, shape in manifest["shapes"].items()},
        adam_steps=manifest["adam_steps"],
        files=manifest["files"],
        pieces=piece_table(manifest["files"]),
    )


FILE = re.compile(r"rank[0-9]{5,}\.safetensors")


def _problem(manifest: Mapping[str, Any]) -> str:
    """What is wrong with the structure of a manifest; empty if nothing is."""
    for name in ("state", "versions", "shapes", "adam_steps", "files"):
        if not isinstance(manifest.get(name), dict):
            return f"{name} is not a mapping"
    if not is_step(manifest.get("step")):
        return "step is not a number of steps"
    shapes, steps = manifest["shapes"], manifest["adam_steps"]
    if not all(isinstance(s, list) and all(map(is_step, s)) for s in shapes.values()):
        return "a shape is not a list of sizes"
    if not all(map(is_step, steps.values())):
        return "a step of Adam is not a number"
    for file, entry in manifest["files"].items():
        if not FILE.fullmatch(file) or not isinstance(entry, dict):
            return f"{file!r} is not a file of a checkpoint"
        pieces = entry.get("pieces")
        if not is_step(entry.get("bytes")) or not isinstance(entry.get("sha256"), str):
            return f"{file} has no size or SHA-256"
        if not isinstance(pieces, dict) or not pieces.keys() <= set(KINDS):
            return f"{file} has no table of pieces"
        for kind, by_name in pieces.items():
            if not isinstance(by_name, dict):
                return f"{file}: the pieces of {kind} are not a mapping"
            for name, piece in by_name.items():
                sound = isinstance(piece, list) and len(piece) == 2 and all(map(is_step, piece))
                if not sound or sum(piece) > math.prod(shapes.get(name, [0])):
                    return f"{file}: {kind} of {name!r} is not a piece of the parameter"
    return ""


def score_of(path: Path) -> float | None:
    """The score of a checkpoint at its validation; lower is better. None if there was none, or if
    the checkpoint is damaged."""
    try:
        score = json.loads((path / "manifest.json").read_bytes())["state"]["train"].get("score")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return float(score) if isinstance(score, int | float) else None


FROM_SCRATCH = "remove them to start from scratch, or choose another run.dir"


def newest_verified(run: RunFolder, remedy: str = FROM_SCRATCH) -> Checkpoint | None:
    """The newest checkpoint whose files are all intact; None if there are no checkpoints.

    Collective: all ranks must call it, and each reads some of the files. A damaged checkpoint is
    skipped with a warning that names the file and the damage. Raises UserError if there are
    checkpoints but none is valid, because starting from scratch must be an explicit decision.
    remedy: the end of that message.
    """
    if run.checkpoints.exists() and not run.checkpoints.is_dir():
        raise UserError(f"{run.checkpoints}: is a file, not a folder; rename it")
    steps = on_rank_0(lambda: _not_empty(run))
    for step in reversed(steps):
        damage = [text for text in on_all_ranks(partial(_damage, run.checkpoint(step))) if text]
        if not damage:
            return open_checkpoint(run.checkpoint(step))
        if own_rank() == 0:
            log.warning("checkpoint %d is skipped: %s", step, damage[0])
    if steps:
        raise UserError(
            f"{run.checkpoints}: none of the {len(steps)} checkpoints is valid; {remedy}"
        )
    return None


def _not_empty(run: RunFolder) -> list[int]:
    """Steps of checkpoints; an empty folder is none."""
    steps = []
    for step in run.steps():
        if any(run.checkpoint(step).iterdir()):
            steps.append(step)
        else:
            log.warning("%s: is an empty folder, not a checkpoint", run.checkpoint(step))
    return steps


def open_verified(path: Path) -> Checkpoint:
    """The checkpoint in the folder `path`, whose files are all intact. Collective: all ranks must
    call it, and each reads some of the files. Raises UserError."""
    damage = [text for text in on_all_ranks(partial(_damage, path)) if text]
    if damage:
        raise UserError(f"{damage[0]}; use another checkpoint, or the run folder")
    return open_checkpoint(path)


def _damage(path: Path) -> str:
    """The damage in the files of a checkpoint that this rank verifies; empty if there is none."""
    try:
        open_checkpoint(path).verify(own_rank(), rank_count())
    except (DamagedCheckpoint, OSError) as error:
        return str(error)
    return ""
