"""The reports of a run while it trains: rows and curves, pictures, heartbeats, a console line.

    sums and times of steps --step_done, once per row--> metrics.jsonl, tb/, log, watchdog

Every rank has one; ranks other than 0 take part in the reductions and feed their watchdog. In a run
with several modalities, batch metrics are reported per modality, over that modality's steps.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from d2v_ds.batch import StepBatch
from d2v_ds.config import Config
from d2v_ds.config.decoding import dump_yaml
from d2v_ds.data.checks import LEFT_OUT
from d2v_ds.run.run_folder import RunFolder
from d2v_ds.run.watchdog import Watchdog
from d2v_ds.step import Observer, StepSettings
from d2v_ds.task import Task
from d2v_ds.telemetry.metrics import VALID, Accumulator, MetricsWriter
from d2v_ds.telemetry.pictures import masked_picture

BAD = [f"bad/{kind.replace(' ', '_')}" for kind in LEFT_OUT]  # names of scalars

log = logging.getLogger("d2v_ds")


@dataclass
class Window:
    """The steps of one modality since they were last reported."""

    accumulator: Accumulator = field(default_factory=Accumulator)
    steps: int = 0
    grad_norm: float | Tensor = 0.0  # of the last step


class Telemetry(Observer):
    """Times and sums of the steps since the last report. A context manager."""

    def __init__(
        self, config: Config, run: RunFolder, task: Task, step: int, watchdog: Watchdog
    ) -> None:
        self.config, self.watchdog = config, watchdog
        self.modalities, self.report = task.modalities, task.report
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.windows = {name: Window() for name in self.modalities}
        self.several = len(self.modalities) > 1
        self.pictures_due: set[str] = set()  # modalities
        self.writer = MetricsWriter(run, task.report.tags, step) if self.rank == 0 else None
        self.bar: Any = None
        if self.rank == 0 and config.log.progress and sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=config.run.steps, initial=step, unit="step", dynamic_ncols=True)
        if self.writer and step == 0:
            self.writer.text("configuration", dump_yaml(config), 0)
        self.skipped = 0  # steps, since this start
        self.bad = dict.fromkeys(LEFT_OUT, 0)  # replaced samples of this rank, since this start
        self._reset()

    def __enter__(self) -> Telemetry:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.bar is not None:
            self.bar.close()
        if self.writer:
            self.writer.close()

    def _reset(self) -> None:
        self.since = time.perf_counter()
        self.steps = self.samples = 0
        self.audio_seconds = 0.0
        self.seconds: dict[str, float] = {}  # by part of a step

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - start

    def add(self, modality: str, sums: Mapping[str, Tensor]) -> None:
        self.windows[modality].accumulator.add(sums)

    def step_skipped(self) -> None:
        self.skipped += 1

    @contextmanager
    def not_counted(self) -> Iterator[None]:
        """Time that does not belong to training steps."""
        start = time.perf_counter()
        yield
        self.since += time.perf_counter() - start

    def step_done(
        self,
        batch: StepBatch,
        settings: StepSettings,
        step: int,
        samples: int,
        grad_norm: Tensor,
        scores: Mapping[str, float] | None = None,
    ) -> None:
        """Call it after every applied step. step: its number; samples: seen so far. Collective: all
        ranks must call it. grad_norm is copied to the host once per row of metrics. scores: the
        scalars of a validation after this step, which always has a row."""
        self.steps += 1
        self.samples += batch.samples
        for kind, number in batch.bad.items():
            self.bad[kind] += number
        if self.modalities[batch.modality].batch_unit == "s":
            self.audio_seconds += batch.units
        window = self.windows[batch.modality]
        window.steps, window.grad_norm = window.steps + 1, grad_norm
        if self.bar is not None:
            self.bar.update(step - self.bar.n)
        if step % self.config.log.every == 0 or step == self.config.run.steps or scores:
            self._report(batch, settings, step, samples, scores or {})
        if step % self.config.log.pictures_every == 0:
            self.pictures_due = set(self.modalities)
        if self.writer and batch.modality in self.pictures_due:
            self.pictures_due.remove(batch.modality)
            modality = self.modalities[batch.modality]
            picture = masked_picture(*modality.picture(batch.micro_batches[0]))
            self.writer.image(f"mask/{batch.modality}", picture, step)

    def _report(
        self,
        batch: StepBatch,
        settings: StepSettings,
        step: int,
        samples: int,
        scores: Mapping[str, float],
    ) -> None:
        rows = self._by_modality()
        passed = time.perf_counter() - self.since
        waited = self.seconds.get("data", 0.0)
        busy = waited + self.seconds.get("forward", 0.0)  # in which no rank waits for another
        longest_wait, bad = torch.tensor(waited), torch.tensor(list(self.bad.values()))
        if dist.is_initialized():
            dist.all_reduce(longest_wait, op=dist.ReduceOp.MAX)  # all ranks wait for the slowest
            dist.all_reduce(bad)
        self.watchdog.pace(busy / self.steps, waited / self.steps)
        if self.writer:
            epochs = {s: {"epoch": float(at["epoch"])} for s, at in batch.cursor.items()}
            row = {
                **named(rows, self.several),
                "lr": settings.lr,
                "weight_decay": settings.weight_decay,
                "decay": settings.ema_decay,
                "skipped": float(self.skipped),
                "step_s": passed / self.steps,
                "samples_s": self.samples / passed,
                "wait_share": float(longest_wait) / passed,
                "bad": float(bad.sum()),
                **{name: float(n) for name, n in zip(BAD, bad, strict=True) if n},
                **named(epochs, len(epochs) > 1),
                **scores,
            }
            if self.audio_seconds:
                row["audio_h_per_h"] = self.audio_seconds / passed
            self.writer.scalars(step, samples, row)
            self._print(step, rows, row["step_s"])
            if scores:
                shown = ", ".join(
                    f"{name.removeprefix(VALID)} {value:.4g}" for name, value in scores.items()
                )
                log.info("step %d: validation: %s", step, shown)
        self._reset()

    def _by_modality(self) -> dict[str, dict[str, float]]:
        """The scalars of each modality that took steps, on rank 0; begins new windows. Collective:
        all ranks must call it after the same steps."""
        rows = {}
        for name, window in self.windows.items():
            if window.steps == 0:
                continue
            sums = window.accumulator.reduce()
            if self.writer:
                rows[name] = {
                    **self.report.summarize(sums, window.steps),
                    "grad_norm": float(window.grad_norm),
                }
            self.windows[name] = Window()
        return rows

    def _print(self, step: int, rows: Mapping[str, Mapping[str, float]], seconds: float) -> None:
        label = {name: f"{name}: " if self.several else "" for name in rows}
        lines = [f"{label[name]}{self.report.line(row)}" for name, row in rows.items()]
        line = "; ".join([*lines, f"{seconds:.2f} s per step"])
        if self.bar is not None:
            self.bar.set_postfix_str(line)
        else:
            log.info("step %d of %d: %s", step, self.config.run.steps, line)
        for name, row in rows.items():
            for warning in self.report.warnings(row):
                log.warning("step %d: %s%s", step, label[name], warning)


def named(values: Mapping[str, Mapping[str, float]], several: bool) -> dict[str, float]:
    """{modality or source: {NAME: value}} as entries of a row: NAME, or NAME/OF in a run with
    several."""
    return {
        f"{name}/{of}" if several else name: value
        for of, row in values.items()
        for name, value in row.items()
    }
