"""What a run tells while it trains: rows and curves, pictures, heartbeats, a line on the console.

    stats, waiting times --step_done, once a cadence--> metrics.jsonl, tb/, log, the watchdog

Every rank has one; those other than rank 0 take part in the reductions and feed their watchdog.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from d2v_ds.batch import StepBatch
from d2v_ds.config import Config
from d2v_ds.decoding import dump_yaml
from d2v_ds.loader import Loader
from d2v_ds.metrics import Accumulator, MetricsWriter, masked_picture, summarize
from d2v_ds.modalities.base import Modality
from d2v_ds.run_folder import RunFolder
from d2v_ds.watchdog import Watchdog

log = logging.getLogger("d2v_ds")

COLLAPSED = 0.1  # spread of the front end's output below which every run was seen to collapse


class Telemetry:
    """Times and sums of the steps since the last cadence. A context manager."""

    def __init__(
        self,
        config: Config,
        run: RunFolder,
        modalities: Mapping[str, Modality],
        step: int,
        watchdog: Watchdog,
    ) -> None:
        self.config, self.modalities, self.watchdog = config, modalities, watchdog
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.accumulator = Accumulator()
        self.writer = MetricsWriter(run, step) if self.rank == 0 else None
        self.bar: Any = None
        if self.rank == 0 and config.log.progress and sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=config.run.steps, initial=step, unit="step", dynamic_ncols=True)
        if self.writer and step == 0:
            self.writer.text("configuration", dump_yaml(config), 0)
        self.step = step
        self.skipped = 0  # steps, since this start
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
        self.units = self.waited = self.busy = 0.0

    def next_batch(self, loader: Loader) -> StepBatch:
        """The loader's next step; the time it takes is time waited for data."""
        start = time.perf_counter()
        self.watchdog.mark("data", self.step)
        step_batch = next(loader)
        self.watchdog.mark("training", self.step)
        self.waited += time.perf_counter() - start
        return step_batch

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Around a forward, in which ranks do not wait for each other (but under ZeRO 3)."""
        start = time.perf_counter()
        yield
        self.busy += time.perf_counter() - start

    def add(self, stats: Mapping[str, Tensor]) -> None:
        self.accumulator.add(stats)

    def step_done(
        self, batch: StepBatch, step: int, samples: int, values: Mapping[str, float | Tensor]
    ) -> None:
        """After every step, with how many were taken in all. values: what only the loop knows; its
        tensors are brought to the host once a cadence. All ranks call it together."""
        self.step = step
        self.steps += 1
        self.samples += batch.samples
        self.units += batch.units
        if self.bar is not None:
            self.bar.update(step - self.bar.n)
        if step % self.config.log.every == 0 or step == self.config.run.steps:
            self._report(batch, step, samples, values)
        if self.writer and step % self.config.log.pictures_every == 0:
            modality = self.modalities[batch.modality]
            picture = masked_picture(*modality.picture(batch.micro_batches[0]))
            self.writer.image(f"mask/{batch.modality}", picture, step)

    def _report(
        self, batch: StepBatch, step: int, samples: int, values: Mapping[str, float | Tensor]
    ) -> None:
        sums = self.accumulator.reduce()
        passed = time.perf_counter() - self.since
        waited = torch.tensor(self.waited)
        if dist.is_initialized():
            dist.all_reduce(waited, op=dist.ReduceOp.MAX)  # all ranks wait for the slowest
        self.watchdog.pace((self.waited + self.busy) / self.steps, self.waited / self.steps)
        if self.writer:
            row = {
                **summarize(sums, self.steps),
                **{name: float(value) for name, value in values.items()},
                "skipped": float(self.skipped),
                "step_s": passed / self.steps,
                "samples_s": self.samples / passed,
                "wait_share": float(waited) / passed,
                "epoch": float(batch.position["epoch"]),
            }
            if self.modalities[batch.modality].unit == "s":
                row["audio_h_per_h"] = self.units / passed
            self.writer.scalars(step, samples, row)
            self._say(step, row)
        self._reset()

    def _say(self, step: int, row: Mapping[str, float]) -> None:
        line = (
            f"loss {row['loss']:.3f}, targets' spread {row['target_spread']:.2f}, explained "
            f"{row['explained_share']:.2f}, front end's spread {row['front_end_spread']:.2f}, "
            f"{row['step_s']:.2f} s a step"
        )
        if self.bar is not None:
            self.bar.set_postfix_str(line)
        else:
            log.info("step %d of %d: %s", step, self.config.run.steps, line)
        if row["front_end_spread"] < COLLAPSED:
            log.warning(
                "step %d: the front end's output hardly changes over time (%.3f). Runs that stay "
                "below %.1f have collapsed: lower optim.lr, warm up longer, or crop longer pieces",
                step,
                row["front_end_spread"],
                COLLAPSED,
            )
