"""Loading: find the newest sound checkpoint, read from it whatever pieces this rank owns."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from d2v_ds.checkpoint.format import (
    FORMAT,
    DamagedCheckpoint,
    Files,
    Kind,
    Pieces,
    PieceTable,
    Shapes,
    by_kind,
    piece_table,
)
from d2v_ds.distributed.collectives import all_gather, on_all_ranks, own_rank, rank_count
from d2v_ds.engine import Partition
from d2v_ds.errors import UserError
from d2v_ds.files import sha256
from d2v_ds.run.run_folder import RunFolder

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """One published checkpoint, opened: the manifest is in memory, the tensors are not."""

    path: Path
    step: int
    state: Mapping[str, Any]
    versions: Mapping[str, str]
    shapes: Shapes
    adam_steps: Mapping[str, int]
    files: Files
    pieces: PieceTable

    def verify(self, rank: int = 0, ranks: int = 1) -> None:
        """Reads every `ranks`-th file from number `rank` on. Raises DamagedCheckpoint."""
        for name, entry in list(self.files.items())[rank::ranks]:
            path = self.path / name
            if not path.is_file():
                raise DamagedCheckpoint(f"{path}: missing")
            if (size := path.stat().st_size) != entry["bytes"]:
                raise DamagedCheckpoint(f"{path}: has {size} bytes, {entry['bytes']} were written")
            if sha256(path) != entry["sha256"]:
                raise DamagedCheckpoint(f"{path}: its SHA-256 is not that of what was written")

    def restore(
        self, partitions: Mapping[str, Partition], ema: Mapping[Kind, Pieces], shapes: Shapes
    ) -> None:
        """Writes this rank's own pieces in place, from those of whatever stage and ranks.

        shapes: every parameter of this run's model and teacher, as given to `Saver.start`. Raises
        UserError when names or shapes differ from the checkpoint's; nothing is written then.
        The caller's low-precision copies are stale afterwards: engine.refresh().
        """
        self._refuse_other_model(shapes)
        wanted = by_kind(partitions, ema)
        for kind, pieces in wanted.items():
            for name in pieces:
                assert name in self.pieces[kind], f"{name}: {self.path} has no {kind} of it"
        written: dict[int, tuple[str, int]] = {}  # parameters of a group may share one step tensor
        for name, partition in partitions.items():
            first, step = written.setdefault(id(partition.adam_step), (name, self.adam_steps[name]))
            assert step == self.adam_steps[name], (
                f"{name} and {first} share one Adam step here and differ in {self.path}"
            )
        with torch.no_grad(), self._reader() as read:
            for kind, pieces in wanted.items():
                for name, (offset, values) in pieces.items():
                    read(kind, name, offset, values)
            for name, partition in partitions.items():
                partition.adam_step.fill_(self.adam_steps[name])

    def tensors(self, kind: Kind) -> dict[str, Tensor]:
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
    def _reader(self) -> Iterator[Callable[[Kind, str, int, Tensor], None]]:
        """read(kind, name, offset, into): fills `into` with the elements from `offset` on. Files
        are mapped, not read whole, and only those that hold what is asked for are opened."""
        with contextlib.ExitStack() as stack:
            opened: dict[str, Any] = {}

            def read(kind: Kind, name: str, offset: int, into: Tensor) -> None:
                end = offset + into.numel()
                filled = 0
                for start, length, file in self.pieces[kind][name]:
                    low, high = max(offset, start), min(end, start + length)
                    if low >= high:
                        continue
                    if file not in opened:
                        opened[file] = stack.enter_context(safe_open(self.path / file, "pt"))
                    stored = opened[file].get_slice(f"{kind}/{name}")
                    into[low - offset : high - offset].copy_(stored[low - start : high - start])
                    filled += high - low
                assert filled == into.numel(), (
                    f"{name}: {filled} of the elements {offset} to {end} are in {self.path}"
                )

            yield read

    def _refuse_other_model(self, shapes: Shapes) -> None:
        differing = []
        for name in [*self.shapes, *(name for name in shapes if name not in self.shapes)]:
            was, now = self.shapes.get(name), shapes.get(name)
            if was is None:
                differing.append(f"without {name}, which this run has")
            elif now is None:
                differing.append(f"with {name}, which this run has not")
            elif was != tuple(now):
                differing.append(f"with {name} of shape {list(was)}, this run has {list(now)}")
        if differing:
            more = f" ({len(differing)} parameters differ in all)" if len(differing) > 1 else ""
            raise UserError(
                f"checkpoint {self.step} was written {differing[0]}{more}. Resume needs an equal "
                "model; choose another run.dir."
            )


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in the folder `path`; its tensors are not read, so not verified, yet.

    Raises DamagedCheckpoint when it is not whole, UserError when its format is not ours.
    """
    if not path.is_dir():
        raise UserError(f"{path}: no such checkpoint")
    for name in ("COMPLETE", "manifest.json"):
        if not (path / name).is_file():
            raise DamagedCheckpoint(f"{path / name}: missing, so this is no complete checkpoint")
    text = (path / "manifest.json").read_bytes()
    if hashlib.sha256(text).hexdigest() != (path / "COMPLETE").read_text(errors="replace").strip():
        raise DamagedCheckpoint(f"{path / 'manifest.json'}: its SHA-256 is not that in COMPLETE")
    manifest = json.loads(text)
    if manifest["format"] != FORMAT:
        raise UserError(
            f"{path}: has checkpoint format {manifest['format']}, this d2v_ds reads {FORMAT}; "
            f"use the d2v_ds that wrote it ({manifest['versions'].get('d2v-ds', 'unknown')})"
        )
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


def newest_verified(run: RunFolder) -> Checkpoint | None:
    """The newest checkpoint whose every file is what was written; None if there is none at all.

    All ranks call it together, and share the reading. A damaged one is passed over with a warning
    that names the file and what is wrong. Raises UserError when there are checkpoints and none is
    sound: to start again from nothing must be a person's decision.
    """
    steps = all_gather(run.steps())[0]
    for step in reversed(steps):
        damage = [text for text in on_all_ranks(partial(_damage, run.checkpoint(step))) if text]
        if not damage:
            return open_checkpoint(run.checkpoint(step))
        if own_rank() == 0:
            log.warning("checkpoint %d is passed over: %s", step, damage[0])
    if steps:
        raise UserError(
            f"{run.checkpoints}: none of the {len(steps)} checkpoints is sound; remove them to "
            "start again, or choose another run.dir"
        )
    return None


def _damage(path: Path) -> str:
    """What is wrong with this rank's part of a checkpoint's files; empty if nothing is."""
    try:
        open_checkpoint(path).verify(own_rank(), rank_count())
    except (DamagedCheckpoint, OSError) as error:
        return str(error)
    return ""
