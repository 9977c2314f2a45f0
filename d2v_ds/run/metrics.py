"""Metrics: sums on the device, one reduction a cadence, scalars in metrics.jsonl and TensorBoard.

    stats of a micro-batch --Accumulator.add--> fp64 sums on the device
        --reduce (one all-reduce, one host synchronisation)--> sums of all ranks
        --summarize--> scalars --MetricsWriter (rank 0)--> metrics.jsonl, tb/

N masked tokens, T tokens of the model, F mel bands, D target width, P places in time.
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

VARIANCE_EPS = 1e-6  # fairseq, compute_var

# Our name -> TensorBoard's. NAME/OF, a value of one modality or source, is shown under TAG/OF;
# loss/speech under loss/speech.
TAGS = {
    "loss": "loss/total",
    "target_spread": "repr/std_target",
    "prediction_spread": "repr/std_prediction",
    "target_sample_spread": "repr/std_target_samples",
    "target_rank": "repr/rank_target",
    "front_end_spread": "repr/std_front_end_time",
    "explained_share": "repr/explained_share",
    "masked_share": "mask/share",
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


class Accumulator:
    """Sums of what the model reports, over micro-batches, steps and ranks.

    Kept in fp64: over the 1e6 masked tokens of a cadence, fp32 totals of squares leave two digits
    of a spread that is small beside the mean. The names and shapes of the first `add` after a
    `reduce` hold until the next; each modality of a mixture has one of its own.
    """

    def __init__(self) -> None:
        self._layout: list[tuple[str, torch.Size]] = []
        self._total: Tensor | None = None  # fp64, everything in one vector

    def add(self, stats: Mapping[str, Tensor]) -> None:
        """Adds one micro-batch's sums, scalars or vectors; no host synchronisation."""
        layout = [(name, stats[name].shape) for name in sorted(stats)]
        packed = torch.cat([stats[name].detach().reshape(-1) for name, _ in layout])
        if self._total is None:
            self._layout, self._total = layout, packed.double()
            return
        assert layout == self._layout, f"the model reported {layout}, before it {self._layout}"
        self._total += packed

    def reduce(self) -> dict[str, npt.NDArray[np.float64]]:
        """Sums over all ranks since the last call, on the host; empty if nothing was added.

        All ranks call it together, after equal reports.
        """
        if self._total is None:
            return {}
        code = zlib.crc32(repr(self._layout).encode())  # ranks that differ would add up nonsense
        packed = torch.cat([self._total.new_tensor([code]), self._total])
        if dist.is_initialized():
            dist.all_reduce(packed)
        values = packed.cpu().numpy()
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        assert values[0] == code * ranks, f"ranks report different stats; this one {self._layout}"
        sums, start = {}, 1
        for name, shape in self._layout:
            sums[name] = values[start : start + shape.numel()].reshape(shape)
            start += shape.numel()
        self._total = None
        return sums


def summarize(sums: Mapping[str, npt.NDArray[np.float64]], steps: int = 1) -> dict[str, float]:
    """Scalars from the sums of `steps` optimizer steps.

    sums: loss (each step's normalised by its own masked count), masked, tokens, samples; error, the
    sum over masked tokens of |p - y|^2; target_sum, target_sq, prediction_sum, prediction_sq [D];
    front_std, the sum over samples of the mean over channels of the standard deviation over time
    of the front end's output; sampled, sampled_sum [D], sampled_products [D, D] of some targets;
    placed [P], placed_sum, placed_sq [P, D] of all samples' targets at P places. NaN where there
    was nothing.

    Spreads are fairseq's `target_var` and `pred_var`: mean_d sqrt(var_d + 1e-6), unbiased; that of
    samples is between the targets of different samples at one place, and falls to 0 where they
    tell places apart and nothing else. explained_share: 1 - error / sum |y - mean|^2. target_rank:
    the effective rank (Roy and Vetterli 2007) of the targets' covariance.
    """
    count = float(sums["masked"])
    target = _squared_deviations(sums["target_sum"], sums["target_sq"], count)
    prediction = _squared_deviations(sums["prediction_sum"], sums["prediction_sq"], count)
    of_samples = [
        _spread(_squared_deviations(total, squares, float(number)), float(number))
        for number, total, squares in zip(
            sums["placed"], sums["placed_sum"], sums["placed_sq"], strict=True
        )
    ]
    return {
        "loss": float(sums["loss"]) / steps,
        "target_spread": _spread(target, count),
        "prediction_spread": _spread(prediction, count),
        "target_sample_spread": float(np.mean(of_samples)),
        "target_rank": effective_rank(
            sums["sampled_products"], sums["sampled_sum"], float(sums["sampled"])
        ),
        "front_end_spread": _ratio(float(sums["front_std"]), float(sums["samples"])),
        "explained_share": 1.0 - _ratio(float(sums["error"]), float(target.sum())),
        "masked_share": _ratio(count, float(sums["tokens"])),
    }


def effective_rank(
    products: npt.NDArray[np.float64], total: npt.NDArray[np.float64], count: float
) -> float:
    """exp of the entropy of the covariance's eigenvalues, which are taken as shares: 1 for vectors
    on a line, D for equal spread in all directions. products [D, D]: sum of y y^T, total [D]."""
    if count < 2:
        return math.nan
    covariance = products / count - np.outer(total, total) / count**2
    if not np.isfinite(covariance).all():
        return math.nan
    spectrum = np.maximum(np.linalg.eigvalsh(covariance.astype(np.float32)), 0.0)
    shares = spectrum[spectrum > 0] / spectrum.sum(dtype=np.float64)
    return float(np.exp(-(shares * np.log(shares)).sum())) if len(shares) else math.nan


def _squared_deviations(
    total: npt.NDArray[np.float64], squares: npt.NDArray[np.float64], count: float
) -> npt.NDArray[np.float64]:
    """[D]: sum over the tokens of (y - mean)^2; rounding can take it a little below 0."""
    return np.maximum(squares - total**2 / max(count, 1.0), 0.0)


def _spread(deviations: npt.NDArray[np.float64], count: float) -> float:
    if count < 2:
        return math.nan
    return float(np.sqrt(deviations / (count - 1) + VARIANCE_EPS).mean())


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


def tag_of(name: str) -> str:
    """TensorBoard's name of a value."""
    name, of, modality = name.partition("/")
    assert name in TAGS, f"{name!r} is not in TAGS"
    return TAGS[name].removesuffix("/total") + of + modality if of else TAGS[name]


class MetricsWriter:
    """Rows in metrics.jsonl and curves in tb/, on rank 0.

    step: where the run goes on; rows and events of later steps, which a start that was cut short
    left behind, are taken back, so that curves neither overlap nor have gaps.
    """

    def __init__(self, run: RunFolder, step: int = 0) -> None:
        # imported late: it takes a moment, and ranks other than 0 never need it
        from torch.utils.tensorboard import SummaryWriter

        run.root.mkdir(parents=True, exist_ok=True)
        _cut_back(run.metrics, step)
        self._rows = run.metrics.open("a")
        self._events = SummaryWriter(str(run.tensorboard), purge_step=step + 1 if step else 0)

    def scalars(self, step: int, samples: int, values: Mapping[str, float]) -> None:
        """One row: `step` steps and `samples` samples are done. Names are of TAGS, or NAME/OF.

        A value that is not finite is null in the row.
        """
        now = time.time()
        row: dict[str, Any] = {"step": step, "samples": samples, "time": round(now, 3)}
        for name, value in values.items():
            tag = tag_of(name)
            row[name] = float(value) if math.isfinite(value) else None
            self._events.add_scalar(tag, value, step, walltime=now)
        self._rows.write(json.dumps(row) + "\n")
        self._rows.flush()
        self._events.flush()

    def text(self, tag: str, text: str, step: int) -> None:
        """`text` as it stands, in a fixed-width font."""
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


def _cut_back(path: Path, step: int) -> None:
    """Cuts metrics.jsonl before its first row of a later step, or that a crash left unfinished."""
    if not path.exists():
        return
    kept = 0
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n") or json.loads(line)["step"] > step:
                break
            kept += len(line)
    os.truncate(path, kept)


# ----------------------------------------------------------------------------------------- pictures

RAMP = np.array(  # dark blue, violet, red, orange, pale yellow: light means loud
    [[8, 8, 40], [84, 20, 110], [196, 52, 78], [246, 142, 48], [252, 246, 190]], dtype=np.float64
)
MASK_COLOUR = np.array([150.0, 170.0, 190.0])
MASK_OPACITY = 0.65
PIXELS = 4  # of a mel band and of a frame


def masked_picture(
    log_mel: npt.NDArray[np.floating[Any]], mask: npt.NDArray[np.bool_]
) -> npt.NDArray[np.uint8]:
    """A spectrogram with its masked part shaded: [height, width, 3], low frequencies at the bottom.

    log_mel: [frames, F], of any frame rate; mask: [T], over the same time, or [T, u] over both
    axes, as of an image [across, up].
    """
    low, high = np.percentile(log_mel, [1, 99])
    level = np.clip((log_mel - low) / max(float(high - low), 1e-6), 0.0, 1.0)
    stops = np.linspace(0.0, 1.0, len(RAMP))
    picture = np.stack([np.interp(level, stops, RAMP[:, c]) for c in range(3)], axis=-1)
    frames = len(log_mel)
    shaded = mask[np.arange(frames) * len(mask) // frames]  # [frames] or [frames, u]
    if mask.ndim == 2:
        rows = log_mel.shape[1]
        shaded = shaded[:, np.arange(rows) * mask.shape[1] // rows]  # [frames, F]
    picture[shaded] += MASK_OPACITY * (MASK_COLOUR - picture[shaded])
    upright = picture.transpose(1, 0, 2)[::-1].round().astype(np.uint8)
    return upright.repeat(PIXELS, axis=0).repeat(PIXELS, axis=1)
