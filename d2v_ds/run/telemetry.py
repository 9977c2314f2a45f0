"""What a run tells while it trains: rows and curves, pictures, heartbeats, a line on the console.

    stats, waiting times --step_done, once a cadence--> metrics.jsonl, tb/, log, the watchdog

Every rank has one; those other than rank 0 take part in the reductions and feed their watchdog.
Where a run has several modalities, what is told of a batch is told of each, over its own steps.
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
from d2v_ds.data.loader.mixture import Mixture
from d2v_ds.modalities.base import Modality
from d2v_ds.run.metrics import Accumulator, MetricsWriter, masked_picture, summarize
from d2v_ds.run.run_folder import RunFolder
from d2v_ds.run.watchdog import Watchdog

log = logging.getLogger("d2v_ds")

SIGNS = {  # of collapse: the spread below which runs were seen to collapse, and what it is to say
    "front_end_spread": (0.1, "the front end's output hardly changes over time"),
    # while the spread of all targets and their rank stay high, and nearly all of it is explained
    "target_sample_spread": (0.2, "at one place the targets of all samples are about the same"),
}


@dataclass
class Window:
    """The steps of one modality since the last cadence that told of it."""

    accumulator: Accumulator = field(default_factory=Accumulator)
    steps: int = 0
    grad_norm: float | Tensor = 0.0  # of the last


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
        self.windows = {name: Window() for name in modalities}
        self.several = len(modalities) > 1
        self.pictures_due: set[str] = set()  # modalities
        self.writer = MetricsWriter(run, step) if self.rank == 0 else None
        self.bar: Any = None
        if self.rank == 0 and config.log.progress and sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=config.run.steps, initial=step, unit="step", dynamic_ncols=True)
        if self.writer and step == 0:
            self.writer.text("configuration", dump_yaml(config), 0)
        self.step = step
        self.skipped = 0  # steps, since this start
        self.bad = 0  # samples of this rank that others stood in for, since this start
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
        self.seconds = self.waited = self.busy = 0.0  # seconds: of audio

    def next_batch(self, mixture: Mixture, step: int) -> StepBatch:
        """The batch of step `step`; the time it takes is time waited for data."""
        start = time.perf_counter()
        self.watchdog.mark("data", self.step)
        step_batch = mixture.next(step)
        self.watchdog.mark("training", self.step)
        self.waited += time.perf_counter() - start
        return step_batch

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Around a forward, in which ranks do not wait for each other (but under ZeRO 3)."""
        start = time.perf_counter()
        yield
        self.busy += time.perf_counter() - start

    def add(self, modality: str, stats: Mapping[str, Tensor]) -> None:
        self.windows[modality].accumulator.add(stats)

    def step_done(
        self,
        batch: StepBatch,
        step: int,
        samples: int,
        grad_norm: Tensor,
        values: Mapping[str, float],
    ) -> None:
        """After every step, with how many were taken in all. grad_norm is brought to the host once
        a cadence; values: what else only the loop knows. All ranks call it together."""
        self.step = step
        self.steps += 1
        self.samples += batch.samples
        self.bad += batch.bad
        self.seconds += batch.units if self.modalities[batch.modality].unit == "s" else 0.0
        window = self.windows[batch.modality]
        window.steps, window.grad_norm = window.steps + 1, grad_norm
        if self.bar is not None:
            self.bar.update(step - self.bar.n)
        if step % self.config.log.every == 0 or step == self.config.run.steps:
            self._report(batch, step, samples, values)
        if step % self.config.log.pictures_every == 0:
            self.pictures_due = set(self.modalities)
        if self.writer and batch.modality in self.pictures_due:
            self.pictures_due.remove(batch.modality)
            modality = self.modalities[batch.modality]
            picture = masked_picture(*modality.picture(batch.micro_batches[0]))
            self.writer.image(f"mask/{batch.modality}", picture, step)

    def _report(
        self, batch: StepBatch, step: int, samples: int, values: Mapping[str, float]
    ) -> None:
        told = self._by_modality()
        passed = time.perf_counter() - self.since
        waited, bad = torch.tensor(self.waited), torch.tensor(self.bad)
        if dist.is_initialized():
            dist.all_reduce(waited, op=dist.ReduceOp.MAX)  # all ranks wait for the slowest
            dist.all_reduce(bad)
        self.watchdog.pace((self.waited + self.busy) / self.steps, self.waited / self.steps)
        if self.writer:
            epochs = {s: {"epoch": float(at["epoch"])} for s, at in batch.position.items()}
            row = {
                **named(told, self.several),
                **values,
                "skipped": float(self.skipped),
                "step_s": passed / self.steps,
                "samples_s": self.samples / passed,
                "wait_share": float(waited) / passed,
                "bad": float(bad),
                **named(epochs, len(epochs) > 1),
            }
            if self.seconds:
                row["audio_h_per_h"] = self.seconds / passed
            self.writer.scalars(step, samples, row)
            self._say(step, told, row["step_s"])
        self._reset()

    def _by_modality(self) -> dict[str, dict[str, float]]:
        """What is told of each modality that took steps; begins new windows for them. All ranks
        together, which took the same steps."""
        told = {}
        for name, window in self.windows.items():
            if window.steps == 0:
                continue
            sums = window.accumulator.reduce()
            if self.writer:
                told[name] = {
                    **summarize(sums, window.steps),
                    "grad_norm": float(window.grad_norm),
                }
            self.windows[name] = Window()
        return told

    def _say(self, step: int, told: Mapping[str, Mapping[str, float]], seconds: float) -> None:
        label = {name: f"{name}: " if self.several else "" for name in told}
        lines = [
            f"{label[name]}loss {row['loss']:.3f}, targets' spread {row['target_spread']:.2f}, "
            f"explained {row['explained_share']:.2f}, front end's spread "
            f"{row['front_end_spread']:.2f}"
            for name, row in told.items()
        ]
        line = "; ".join([*lines, f"{seconds:.2f} s a step"])
        if self.bar is not None:
            self.bar.set_postfix_str(line)
        else:
            log.info("step %d of %d: %s", step, self.config.run.steps, line)
        for name, row in told.items():
            for sign, (least, what) in SIGNS.items():
                if row[sign] < least:
                    log.warning(
                        "step %d: %s%s (%.3f). Runs that stay below %.1f have collapsed: lower "
                        "optim.lr, warm up longer, or train on longer pieces",
                        step,
                        label[name],
                        what,
                        row[sign],
                        least,
                    )


def named(values: Mapping[str, Mapping[str, float]], several: bool) -> dict[str, float]:
    """{modality or source: {NAME: value}} as a row has them: under NAME, or NAME/OF where a run has
    several."""
    return {
        f"{name}/{of}" if several else name: value
        for of, row in values.items()
        for name, value in row.items()
    }
