"""The reports of a run while it trains: rows and curves, pictures, heartbeats, a console line.

    sums and times of steps --step_done, once per row--> metrics.jsonl, tb/, log, watchdog

Every rank has one; ranks other than 0 take part in the reductions and feed their watchdog. In a run
with several modalities, batch metrics are reported per modality, over that modality's steps.
"""

from __future__ import annotations

import contextlib
import logging
import math
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
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
from d2v_ds.task import Sums, Task
from d2v_ds.telemetry.metrics import VALID, Accumulator, MetricsWriter
from d2v_ds.telemetry.pictures import masked_picture

BAD = [f"bad/{kind.replace(' ', '_')}" for kind in LEFT_OUT]  # names of scalars

log = logging.getLogger("d2v_ds")


@dataclass
class Counts:
    """What is counted since the beginning of the run; a checkpoint has the sum over the ranks."""

    skipped: int = 0  # attempts without a finite gradient; rank 0 counts for all
    not_finite: float = 0.0  # applied steps whose sums were not finite; rank 0 counts for all
    bad: dict[str, int] = field(default_factory=dict)  # {kind: replaced samples of this rank}


@dataclass
class Window:
    """The steps of one modality since they were last reported."""

    accumulator: Accumulator = field(default_factory=Accumulator)
    attempt: Accumulator = field(default_factory=Accumulator)  # of the step that is being taken
    steps: int = 0
    grad_norm: float | Tensor = 0.0  # of the last step


class Telemetry(Observer):
    """Times and sums of the steps since the last report. A context manager. counts: at `step`,
    where the run resumes."""

    def __init__(
        self,
        config: Config,
        run: RunFolder,
        task: Task,
        step: int,
        watchdog: Watchdog,
        counts: Counts | None = None,
    ) -> None:
        self.config, self.watchdog = config, watchdog
        self.modalities, self.report = task.modalities, task.report
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.windows = {name: Window() for name in self.modalities}
        self.several = len(self.modalities) > 1
        self.pictures_due: set[str] = set()  # modalities
        self.writer = MetricsWriter(run, task.report.tags, step) if self.rank == 0 else None
        self.bar: Any = None
        if self.rank == 0 and config.log.progress and is_terminal():
            from tqdm import tqdm

            self.bar = tqdm(total=config.run.steps, initial=step, unit="step", dynamic_ncols=True)
        if self.writer and step == 0:
            self.writer.text("configuration", dump_yaml(config), 0)
        self.counts = counts or Counts()
        if self.rank:
            self.counts = Counts()  # rank 0 has what was counted before
        self._reset()

    def __enter__(self) -> Telemetry:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.bar is not None:
            with contextlib.suppress(OSError):  # a closed terminal
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
        self.windows[modality].attempt.add(sums)

    def step_skipped(self, batch: StepBatch) -> None:
        """Call it after every attempt that was not applied: its sums are in no row."""
        self.windows[batch.modality].attempt.drop()
        self.counts.skipped += self.rank == 0
        self._count(batch)

    def _count(self, batch: StepBatch) -> None:
        for kind, number in batch.bad.items():
            self.counts.bad[kind] = self.counts.bad.get(kind, 0) + number

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
        self._count(batch)
        if self.modalities[batch.modality].batch_unit == "s":
            self.audio_seconds += batch.units
        window = self.windows[batch.modality]
        window.steps, window.grad_norm = window.steps + 1, grad_norm
        window.accumulator.take(window.attempt)
        self._advance(step)
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
        longest_wait = torch.tensor(waited)
        bad = torch.tensor([self.counts.bad.get(kind, 0) for kind in LEFT_OUT])
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
                "skipped": float(self.counts.skipped),
                "not_finite": self.counts.not_finite,
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
            self.watchdog.lost(self.writer.losses.total)
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
            covered = window.accumulator.covered
            if self.writer:
                rows[name] = {**self._summary(sums, covered), "steps": covered}
                rows[name]["grad_norm"] = float(window.grad_norm)
                if left_out := window.steps - covered:
                    self.counts.not_finite += left_out
                    log.warning(
                        "%s: the metrics of %g of %d steps are not finite; the row leaves them out",
                        name,
                        left_out,
                        window.steps,
                    )
            self.windows[name] = Window()
        return rows

    def _summary(self, sums: Sums, covered: float) -> dict[str, float]:
        """The scalars of the steps whose sums were finite; NaN if there were none."""
        if covered:
            return self.report.summarize(sums, covered)
        return self.report.summarize({n: np.full_like(x, math.nan) for n, x in sums.items()}, 1)

    def _advance(self, step: int) -> None:
        """Moves the progress bar; without it if its terminal was closed."""
        if self.bar is None:
            return
        try:
            self.bar.update(step - self.bar.n)
        except (OSError, ValueError):
            self.bar = None

    def _print(self, step: int, rows: Mapping[str, Mapping[str, float]], seconds: float) -> None:
        label = {name: f"{name}: " if self.several else "" for name in rows}
        lines = [f"{label[name]}{self.report.line(row)}" for name, row in rows.items()]
        line = "; ".join([*lines, f"{seconds:.2f} s per step"])
        if self.bar is not None:
            self.bar.set_postfix_str(line, refresh=False)  # the next update shows it
        else:
            log.info("step %d of %d: %s", step, self.config.run.steps, line)
        for name, row in rows.items():
            for warning in self.report.warnings(row):
                log.warning("step %d: %s%s", step, label[name], warning)


def is_terminal() -> bool:
    """Whether the standard error output is shown on a terminal; services may have closed it."""
    return sys.stderr is not None and not sys.stderr.closed and sys.stderr.isatty()


def named(values: Mapping[str, Mapping[str, float]], several: bool) -> dict[str, float]:
    """{modality or source: {NAME: value}} as entries of a row: NAME, or NAME/OF in a run with
    several."""
    return {
        f"{name}/{of}" if several else name: value
        for of, row in values.items()
        for name, value in row.items()
    }
