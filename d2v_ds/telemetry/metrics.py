"""Metrics: sums on the device, one reduction per row, scalars in metrics.jsonl and TensorBoard.

sums of a micro-batch --Accumulator.add--> fp64 sums on the device
    --reduce (one all-reduce, one host synchronisation)--> sums of all ranks
    --the task's Report.summarize--> scalars --MetricsWriter (rank 0)--> metrics.jsonl, tb/
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import math
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from d2v_ds.files import sync, temporary, write_durably
from d2v_ds.records import Losses, append, lines, number, parse_metrics
from d2v_ds.run.run_folder import RunFolder
from d2v_ds.telemetry.events import Clock, EventFile

log = logging.getLogger("d2v_ds")

# Our name -> TensorBoard's, for the scalars of the loop; a task adds its own (Report.tags).
# NAME/OF, the value of one modality or source, gets the tag TAG/OF; loss/total becomes loss/OF.
TAGS = {
    "lr": "optim/lr",
    "weight_decay": "optim/weight_decay",
    "grad_norm": "optim/grad_norm",
    "skipped": "optim/skipped",
    "steps": "optim/steps",
    "not_finite": "optim/not_finite",
    "decay": "ema/decay",
    "samples_s": "perf/samples_s",
    "audio_h_per_h": "perf/audio_h_per_h",
    "step_s": "perf/step_s",
    "wait_share": "data/wait_share",
    "bad": "data/bad",
    "epoch": "data/epoch",
}


VALID = "valid_"  # begins the names of a validation's scalars


class Accumulator:
    """Sums of the reported quantities over micro-batches, steps and ranks.

    In fp64: over the 1e6 masked tokens of a row, fp32 sums of squares leave two digits of a
    spread that is small compared to the mean. Names and shapes must not change between two calls
    of `reduce`; each modality of a mixture has its own accumulator.
    """

    def __init__(self) -> None:
        self._layout: list[tuple[str, torch.Size]] = []
        self._total: Tensor | None = None  # fp64: everything in one vector
        self._memory: Tensor | None = None  # for the next total
        self._steps: Tensor | int = 0  # steps that `take` added, on the device
        self.covered = 0.0  # steps in the last result of `reduce`, as a mean over the ranks

    def add(self, sums: Mapping[str, Tensor]) -> None:
        """Adds one micro-batch's sums, scalars or vectors; no host synchronisation."""
        layout = [(name, sums[name].shape) for name in sorted(sums)]
        packed = torch.cat([sums[name].detach().reshape(-1) for name, _ in layout])
        if self._total is None:
            if self._memory is None or self._memory.shape != packed.shape:
                self._memory = packed.double()
            self._layout, self._total = layout, self._memory.copy_(packed)
            return
        assert layout == self._layout, f"the task reported {layout}, previously {self._layout}"
        self._total += packed

    def take(self, step: Accumulator) -> None:
        """Adds the sums of one step, unless one of them is not finite on this rank, and counts it;
        `step` is empty then. No host synchronisation."""
        if step._total is None:
            return
        finite = torch.isfinite(step._total.sum())
        if step._total.is_cuda:  # without waiting for the device
            step._total.masked_fill_(~finite, 0.0)
        elif not finite:
            step._total.zero_()
        if self._total is None:
            self._layout, self._total = step._layout, step._total.clone()
        else:
            assert step._layout == self._layout, f"the task reported {step._layout}"
            self._total += step._total
        self._steps = self._steps + finite
        step.drop()

    def drop(self) -> None:
        """Forgets everything since the last call of `reduce`; keeps the memory."""
        if self._total is not None:
            self._memory = self._total
        self._total, self._steps = None, 0

    def reduce(self) -> dict[str, npt.NDArray[np.float64]]:
        """Sums over all ranks since the last call, on the host; empty if nothing was added. A
        collective: all ranks must call it with the same names."""
        if self._total is None:
            return {}
        code = zlib.crc32(repr(self._layout).encode())  # detects ranks that report different sums
        steps = torch.as_tensor(self._steps, device=self._total.device).double().reshape(1)
        packed = torch.cat([self._total.new_tensor([code]), steps, self._total])
        if dist.is_initialized():
            dist.all_reduce(packed)
        values = packed.cpu().numpy()
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        assert values[0] == code * ranks, f"ranks report different sums; this one {self._layout}"
        sums, start = {}, 2
        for name, shape in self._layout:
            sums[name] = values[start : start + shape.numel()].reshape(shape)
            start += shape.numel()
        self.covered = float(values[1]) / ranks
        self.drop()
        return sums


def tag_of(name: str, tags: Mapping[str, str]) -> str:
    """The TensorBoard tag of a scalar; valid/X for valid_X."""
    if name.startswith(VALID):
        return f"valid/{name.removeprefix(VALID)}"
    name, of, modality = name.partition("/")
    assert name in tags, f"{name!r} has no TensorBoard tag"
    return tags[name].removesuffix("/total") + of + modality if of else tags[name]


class MetricsWriter:
    """Rows in metrics.jsonl and curves in tb/, on rank 0.

    tags: those of the task, in addition to TAGS. step: where the run resumes; rows and events of
    later steps, which an interrupted start left behind, are removed, so that curves do not overlap.
    Rows and events that cannot be written are lost, which the log reports; nothing is raised.
    """

    def __init__(self, run: RunFolder, tags: Mapping[str, str], step: int = 0) -> None:
        self._tags = {**TAGS, **tags}
        self._path = run.metrics
        self._rows: IO[bytes] | None = None
        self.losses = Losses(run.metrics, "rows")
        newest = 0.0
        try:
            newest = _cut_back(run.metrics, step)
        except OSError as error:
            self.losses.failed(error, 0)
        self._clock = Clock(newest + 0.001)  # rows have milliseconds
        purge = step + 1 if step else 0
        self._events = EventFile(run.tensorboard, self._clock, purge)

    def scalars(self, step: int, samples: int, values: Mapping[str, float]) -> None:
        """One row, after `step` steps and `samples` samples. Every name has a tag, or is NAME/OF if
        NAME has a tag. A value that is not finite becomes null in the row."""
        now = self._clock.now()
        row: dict[str, Any] = {"step": step, "samples": samples, "time": round(now, 3)}
        for name, value in values.items():
            row[name] = float(value) if math.isfinite(value) else None
        tags = {tag_of(name, self._tags): value for name, value in values.items()}
        try:
            if self._rows is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._rows = self._path.open("ab", buffering=0)
            append(self._rows, json.dumps(row).encode() + b"\n")
            self.losses.worked()
        except OSError as error:
            self.losses.failed(error)
        self._events.scalars(tags, step)

    def text(self, tag: str, text: str, step: int) -> None:
        """`text` unchanged, in a fixed-width font."""
        self._events.text(tag, text, step)

    def image(self, tag: str, picture: npt.NDArray[np.uint8], step: int) -> None:
        """picture: [height, width, 3]."""
        self._events.image(tag, picture, step)

    def close(self) -> None:
        if self._rows is not None:
            self._rows.close()
        self._events.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def write_evaluation(run: RunFolder, weights: str, step: int, values: Mapping[str, float]) -> Path:
    """Scalars of an evaluation at the step of its checkpoint; returns the folder. It is one of its
    own below tb/: training purges and replaces only the event files in tb/ itself, and TensorBoard
    shows student and teacher as two curves. Raises OSError."""
    folder = run.tensorboard / "eval" / weights
    with contextlib.closing(EventFile(folder, Clock())) as events:
        events.scalars(values, step)
        if events.losses.total:
            raise OSError(errno.EIO, f"{folder} cannot be written")
    return folder


def _cut_back(path: Path, step: int) -> float:
    """Removes the rows of later steps from metrics.jsonl and moves damaged lines to
    metrics.jsonl.damaged; returns the newest time of a row. Raises OSError."""
    kept: list[bytes] = []
    end, newest, removed, damaged = 0, 0.0, 0, 0
    aside = path.with_name(f"{path.name}.damaged")
    with contextlib.ExitStack() as stack:
        for line in lines(path):
            row = parse_metrics(line)
            if row is None:
                if not damaged:
                    set_aside = stack.enter_context(aside.open("ab"))
                damaged += 1
                set_aside.write(line if line.endswith(b"\n") else line + b"\n")
                continue
            newest = max(newest, number(row, "time") or 0.0)
            if row["step"] > step:
                removed += 1
            elif damaged or removed or not line.endswith(b"\n"):
                kept.append(line if line.endswith(b"\n") else line + b"\n")
            else:
                end += len(line)  # of the sound beginning of the file
    if damaged:
        sync(aside)
        log.warning("%s: %d damaged lines were moved to %s", path, damaged, aside.name)
    if kept:
        _replace_end(path, end, kept)
    elif damaged or removed:
        os.truncate(path, end)
    return newest


def _replace_end(path: Path, end: int, kept: list[bytes]) -> None:
    """The first `end` bytes of a file, then these lines; the old file stays if this fails."""
    aside = temporary(path)
    try:
        with path.open("rb") as file:
            write_durably(aside, file.read(end) + b"".join(kept))
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
