"""Metrics: sums on the device, one reduction per row, scalars in metrics.jsonl and TensorBoard.

sums of a micro-batch --Accumulator.add--> fp64 sums on the device
    --reduce (one all-reduce, one host synchronisation)--> sums of all ranks
    --the task's Report.summarize--> scalars --MetricsWriter (rank 0)--> metrics.jsonl, tb/
"""

from __future__ import annotations

import json
import math
import os
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from d2v_ds.run.run_folder import RunFolder

# Our name -> TensorBoard's, for the scalars of the loop; a task adds its own (Report.tags).
# NAME/OF, the value of one modality or source, gets the tag TAG/OF; loss/total becomes loss/OF.
TAGS = {
    "lr": "optim/lr",
    "weight_decay": "optim/weight_decay",
    "grad_norm": "optim/grad_norm",
    "skipped": "optim/skipped",
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
        self._total: Tensor | None = None  # fp64, everything in one vector

    def add(self, sums: Mapping[str, Tensor]) -> None:
        """Adds one micro-batch's sums, scalars or vectors; no host synchronisation."""
        layout = [(name, sums[name].shape) for name in sorted(sums)]
        packed = torch.cat([sums[name].detach().reshape(-1) for name, _ in layout])
        if self._total is None:
            self._layout, self._total = layout, packed.double()
            return
        assert layout == self._layout, f"the task reported {layout}, previously {self._layout}"
        self._total += packed

    def reduce(self) -> dict[str, npt.NDArray[np.float64]]:
        """Sums over all ranks since the last call, on the host; empty if nothing was added. A
        collective: all ranks must call it with the same names."""
        if self._total is None:
            return {}
        code = zlib.crc32(repr(self._layout).encode())  # detects ranks that report different sums
        packed = torch.cat([self._total.new_tensor([code]), self._total])
        if dist.is_initialized():
            dist.all_reduce(packed)
        values = packed.cpu().numpy()
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        assert values[0] == code * ranks, f"ranks report different sums; this one {self._layout}"
        sums, start = {}, 1
        for name, shape in self._layout:
            sums[name] = values[start : start + shape.numel()].reshape(shape)
            start += shape.numel()
        self._total = None
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
    """

    def __init__(self, run: RunFolder, tags: Mapping[str, str], step: int = 0) -> None:
        # imported late: it is slow, and only rank 0 needs it
        from torch.utils.tensorboard import SummaryWriter

        self._tags = {**TAGS, **tags}
        run.root.mkdir(parents=True, exist_ok=True)
        _cut_back(run.metrics, step)
        self._rows = run.metrics.open("a")
        self._events = SummaryWriter(str(run.tensorboard), purge_step=step + 1 if step else 0)

    def scalars(self, step: int, samples: int, values: Mapping[str, float]) -> None:
        """One row, after `step` steps and `samples` samples. Every name has a tag, or is NAME/OF if
        NAME has a tag. A value that is not finite becomes null in the row."""
        now = time.time()
        row: dict[str, Any] = {"step": step, "samples": samples, "time": round(now, 3)}
        for name, value in values.items():
            tag = tag_of(name, self._tags)
            row[name] = float(value) if math.isfinite(value) else None
            self._events.add_scalar(tag, value, step, walltime=now)
        self._rows.write(json.dumps(row) + "\n")
        self._rows.flush()
        self._events.flush()

    def text(self, tag: str, text: str, step: int) -> None:
        """`text` unchanged, in a fixed-width font."""
        block = "".join(f"    {line}\n" for line in text.splitlines())
        self._events.add_text(tag, block, step)
        self._events.flush()

    def image(self, tag: str, picture: npt.NDArray[np.uint8], step: int) -> None:
        """picture: [height, width, 3]."""
        self._events.add_image(tag, picture, step, dataformats="HWC")
        self._events.flush()

    def close(self) -> None:
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


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Appends one line of JSON in a single write, so that lines of several processes do not mix.
    Values that are not finite become null."""
    finite = {
        name: None if isinstance(x, float) and not math.isfinite(x) else x
        for name, x in row.items()
    }
    with path.open("ab", buffering=0) as file:
        file.write(json.dumps(finite).encode() + b"\n")


def write_evaluation(run: RunFolder, weights: str, step: int, values: Mapping[str, float]) -> Path:
    """Scalars of an evaluation at the step of its checkpoint; returns the folder. It is one of its
    own below tb/: training purges and replaces only the event files in tb/ itself, and TensorBoard
    shows student and teacher as two curves."""
    from torch.utils.tensorboard import SummaryWriter

    folder = run.tensorboard / "eval" / weights
    with SummaryWriter(str(folder)) as events:
        for tag, value in values.items():
            events.add_scalar(tag, value, step)
    return folder


def _cut_back(path: Path, step: int) -> None:
    """Truncates metrics.jsonl before the first row of a later step, or the first incomplete row."""
    if not path.exists():
        return
    kept = 0
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n") or json.loads(line)["step"] > step:
                break
            kept += len(line)
    os.truncate(path, kept)
