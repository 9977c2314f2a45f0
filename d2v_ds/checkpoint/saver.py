"""Saving in the background: training waits only for a copy to host memory.

    start: live pieces --copy--> host memory --a thread of each rank--> files in a temporary folder
    poll, between steps: every rank's files are on disk --rank 0--> checkpoints/STEP/

Everything that needs all ranks (agreeing that the files are complete, and publishing them) happens
in `start`, `poll` and `finish`. These are collective: all ranks must call them from their main
threads. The background thread only writes files. Earlier checkpoints stay until a new one is
published.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from torch import Tensor

from d2v_ds.checkpoint import recover, write
from d2v_ds.checkpoint.format import CannotSave, EmaPieces, Files, Shapes, StateKind, by_kind
from d2v_ds.checkpoint.read import score_of
from d2v_ds.distributed.collectives import (
    all_gather,
    all_true,
    on_all_ranks,
    own_rank,
    rank_count,
)
from d2v_ds.engine import Partition, Pieces
from d2v_ds.errors import Superseded
from d2v_ds.files import sync
from d2v_ds.run.run_folder import Generation, RunFolder, refuse_superseded, remove

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class _Pending:
    """A checkpoint that is being written."""

    step: int
    aside: Path
    plan: Mapping[str, Any]
    written: Future[Files]


class Saver:
    """Writes the checkpoints of one start of a run, one at a time.

    keep: the number of newest checkpoints to keep; keep_best: of those with the lowest score, in
    addition (read.score_of); keep_every: checkpoints at multiples of this step are kept permanently
    (0: none). replicated: every rank holds everything, so only rank 0 writes. A failure is raised
    on all ranks by the next method called: CannotSave if files cannot be written, Superseded if a
    newer start owns the run folder; the run folder is then unchanged. Anything else ends the run.
    Host memory for one copy of the state is kept between saves.

    saved: the step of the newest checkpoint that this start published; the caller may set it to the
    step that the run resumes from.
    """

    def __init__(
        self,
        run: RunFolder,
        generation: Generation,
        *,
        keep: int,
        keep_best: int = 0,
        keep_every: int = 0,
        replicated: bool = False,
    ) -> None:
        self.run, self.generation = run, generation
        self.keep, self.keep_best, self.keep_every = keep, keep_best, keep_every
        self._owns = own_rank() == 0 or not replicated
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._host: dict[tuple[StateKind, str], Tensor] = {}
        self._pending: _Pending | None = None
        self._scores: dict[int, float | None] = {}  # by step, as far as they were read
        self.saved: int | None = None

    def start(
        self,
        step: int,
        *,
        partitions: Mapping[str, Partition],
        ema: EmaPieces,
        shapes: Shapes,
        state: Mapping[str, Any],
    ) -> None:
        """Begins checkpoints/STEP, after finishing the previous one; returns once the state is
        copied to host memory.

        Each rank passes the pieces that it owns; `shapes` has every parameter of the task. state:
        everything else that training needs to resume, as JSON.
        """
        self.finish()
        kinds = by_kind(partitions, ema) if self._owns else {}
        steps = (
            {n: int(partition.adam_step) for n, partition in partitions.items()}
            if self._owns
            else {}
        )
        size = sum(values.nbytes for pieces in kinds.values() for _, values in pieces.values())
        sizes, owns = zip(*all_gather((size, self._owns)), strict=True)
        needed = sum(sizes)
        rank = own_rank()
        aside = self.run.checkpoints / f".{step:08d}.{self.generation.number}.tmp"
        try:
            on_all_ranks(lambda: self._prepare(aside, step, needed) if rank == 0 else None)
            adam_steps = _merge_steps(all_gather(steps))
            copies: dict[StateKind, Pieces] = {}
            on_all_ranks(lambda: copies.update(self._copy(kinds)))
        except BaseException:
            self._discard(aside)
            raise
        plan = {"step": step, "state": state, "shapes": shapes, "adam_steps": adam_steps}
        plan["owners"] = rank_count() if all(owns) else 1
        written = self._thread.submit(self._write, aside, copies, plan)
        self._pending = _Pending(step, aside, plan, written)

    def _write(
        self, aside: Path, copies: Mapping[StateKind, Pieces], plan: Mapping[str, Any]
    ) -> Files:
        """In the background thread."""
        if not self._owns:
            return {}
        return write.write_pieces(aside, own_rank(), copies, plan if own_rank() == 0 else None)

    def poll(self) -> None:
        """Publishes the pending checkpoint if every rank has written its part."""
        if self._pending and all_true(self._pending.written.done()):
            self.finish()

    def finish(self) -> None:
        """Waits for the pending checkpoint, if there is one, publishes it, and removes those that
        are no longer to be kept."""
        if self._pending is None:
            return
        pending = self._pending
        try:
            files = on_all_ranks(lambda: self._written(pending))
            manifest = write.build_manifest(pending.plan, files)
            on_all_ranks(lambda: self._publish(pending, manifest))
        except (CannotSave, Superseded, AssertionError):
            self._pending = None
            self._discard(pending.aside)
            raise
        # After any other error, ranks are lost: `rescue` or the next start publishes the files.
        self._pending, self.saved = None, pending.step
        if own_rank() == 0:
            self._retain(pending.step)

    def rescue(self, seconds: float) -> None:
        """After an error that ends the run: publishes the pending checkpoint if the files of all
        ranks are complete within `seconds`; otherwise the next start does. Not collective, and
        raises nothing."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        end = time.monotonic() + seconds
        try:
            pending.written.result(seconds)
            if own_rank() != 0:
                return
            while (manifest := recover.assemble(pending.aside)) is None:
                if time.monotonic() > end:
                    raise TimeoutError("other ranks did not finish writing it")
                time.sleep(0.05)
            self._publish(pending, manifest)
            log.warning("checkpoint %d, which was being written, is published", pending.step)
        except Exception as error:  # whatever it is, the error that ends the run is the one to show
            log.warning("checkpoint %d is not published: %s", pending.step, error)

    def _prepare(self, aside: Path, step: int, needed: int) -> None:
        """Creates the folder to write into, if there is space and this start still owns the run."""
        refuse_superseded(self.run, self.generation)

        def create() -> None:
            self.run.checkpoints.mkdir(exist_ok=True)
            free = shutil.disk_usage(self.run.checkpoints).free
            if free < needed * 1.01 + 2**20:  # plus file headers and the manifest
                raise CannotSave(
                    f"{self.run.checkpoints}: a checkpoint needs {needed / 1e9:.3g} GB, "
                    f"but only {free / 1e9:.3g} GB are free; free some space or lower save.keep "
                    "(one more checkpoint is on disk while saving)"
                )
            remove(aside)
            aside.mkdir()

        self._on_disk(step, create)

    def _on_disk(self, step: int, action: Callable[[], T]) -> T:
        """Errors of the disk, which a later save may not meet, become CannotSave."""
        try:
            return action()
        except (OSError, SafetensorError) as error:
            raise CannotSave(
                f"{self.run.checkpoints}: rank {own_rank()} cannot write checkpoint {step}: {error}"
            ) from None

    def _copy(self, kinds: Mapping[StateKind, Pieces]) -> dict[StateKind, Pieces]:
        """The pieces in host memory, which is reused by the next save."""
        copies: dict[StateKind, Pieces] = {}
        for kind, pieces in kinds.items():
            own = {}
            for name, (offset, values) in pieces.items():
                copy = self._host.get((kind, name))
                if copy is None:
                    copy = torch.empty_like(values, device="cpu", pin_memory=values.is_cuda)
                    self._host[kind, name] = copy
                own[name] = offset, copy.copy_(values, non_blocking=True)
            copies[kind] = own
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return copies

    def _written(self, pending: _Pending) -> Files:
        """The files that this rank wrote. A newer start deletes the files that an older one is
        writing; this is reported as Superseded, not as missing files."""
        try:
            return self._on_disk(pending.step, pending.written.result)
        except Exception:
            refuse_superseded(self.run, self.generation)
            raise

    def _publish(self, pending: _Pending, manifest: Mapping[str, Any]) -> None:
        if own_rank() == 0:
            self._on_disk(
                pending.step,
                lambda: write.publish(self.run, self.generation, pending.aside, manifest),
            )

    def _discard(self, aside: Path) -> None:
        if own_rank() == 0:
            shutil.rmtree(aside, ignore_errors=True)

    def _retain(self, step: int) -> None:
        """Removes checkpoints up to `step`, the newly published one, that are no longer to be kept.

        Checkpoints of later steps remain if they are damaged and the run therefore resumed from an
        earlier one. They are neither counted nor removed, because training will replace them.
        """
        steps = [s for s in self.run.steps() if s <= step]
        self._scores.pop(step, None)  # it may have replaced a damaged one
        for s in steps:
            if s not in self._scores:  # manifests never change and can be large
                self._scores[s] = score_of(self.run.checkpoint(s))
        scored = [(score, s) for s in steps if (score := self._scores[s]) is not None]
        best = [s for _, s in sorted(scored)]
        kept = {*steps[-self.keep :], *best[: self.keep_best]}
        if self.keep_every:
            kept |= {s for s in steps if s % self.keep_every == 0}
        for old in set(steps) - kept:
            removed = self.run.checkpoints / f".{old:08d}.removed"
            try:
                os.rename(self.run.checkpoint(old), removed)
                sync(self.run.checkpoints)  # a power failure must not leave an empty folder
                remove(removed)
            except OSError as error:  # an extra checkpoint is no reason to end a run
                log.warning("cannot remove %s: %s", self.run.checkpoint(old), error)
        if kept & set(best):
            self._point_to(next(s for s in best if s in kept))

    def _point_to(self, step: int) -> None:
        """Makes checkpoints/best a link to the best checkpoint."""
        link = self.run.checkpoints / "best"
        aside = self.run.checkpoints / f".best.{self.generation.number}"
        try:
            aside.unlink(missing_ok=True)
            aside.symlink_to(self.run.checkpoint(step).name)
            os.replace(aside, link)
        except OSError as error:  # a file system without links
            log.warning("cannot make the link %s to checkpoint %d: %s", link, step, error)


def _merge_steps(ranks: list[dict[str, int]]) -> dict[str, int]:
    """Adam's step by parameter; all ranks that own a part of it must agree."""
    merged: dict[str, int] = {}
    for steps in ranks:
        for name, step in steps.items():
            assert merged.setdefault(name, step) == step, f"{name}: ranks differ in Adam's step"
    return merged
