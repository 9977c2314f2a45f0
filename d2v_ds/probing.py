"""Probes of checkpoints while the run trains.

    a published checkpoint --a process of rank 0's node, on the CPU--> `d2v-ds evaluate`
        --> evaluations.jsonl, curves eval/* in tb/, a line in the log

Training does not wait for a probe; a finished run waits for that of its last checkpoint. A
checkpoint that is published while a probe runs is probed next, unless there is a newer one then.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from d2v_ds.config import Config
from d2v_ds.run.run_folder import RunFolder
from d2v_ds.run.watchdog import Watchdog

log = logging.getLogger("d2v_ds")

INTERVAL = 5.0  # seconds between two looks while training
POLL = 0.5  # the same, at the end of the run
LONGEST = 600.0  # seconds that a finished run waits


@dataclass
class _Running:
    step: int
    modality: str
    process: subprocess.Popen[str]
    output: IO[str]


class Probing:
    """The probes of a run, on rank 0."""

    def __init__(self, config: Config, run: RunFolder, logs: Path, probed: int) -> None:
        """logs: where the output of the processes goes. probed: the step of the checkpoint that the
        run resumes from; later ones are probed."""
        self.config, self.run, self.logs = config, run, logs
        self.newest, self.next = probed, 0.0
        self.waiting: deque[str] = deque()  # modalities of the checkpoint that is being probed
        self.running: _Running | None = None

    def poll(self) -> None:
        """Reports a probe that has ended, and starts that of a new checkpoint. Looks at most every
        INTERVAL seconds, so that it can be called after every step."""
        if time.monotonic() >= self.next:
            self.next = time.monotonic() + INTERVAL
            self._look()

    def _look(self) -> None:
        if self.running:
            if self.running.process.poll() is None:
                return
            self._report(self.running)
            self.running = None
        if not self.waiting:
            published = [step for step in self.run.steps() if step > self.newest]
            if not published:
                return
            if skipped := published[:-1]:
                log.info("not probed, because another probe was running: checkpoints %s", skipped)
            self.newest = published[-1]
            self.waiting.extend(self.config.probes)
        modality = self.waiting.popleft()
        try:
            self._start(self.newest, modality)
        except OSError as error:  # a full disk, no memory
            log.warning("the probe of checkpoint %d cannot start: %s", self.newest, error)

    def finish(self, watchdog: Watchdog) -> None:
        """Waits until the last checkpoint is probed, at most LONGEST seconds."""
        end = time.monotonic() + LONGEST
        self._look()
        while self.running and time.monotonic() < end:
            watchdog.mark("probing", self.newest)
            time.sleep(POLL)
            self._look()
        if self.running:
            log.warning(
                "the probe of checkpoint %d is stopped after %g s; run `d2v-ds evaluate` on it",
                self.running.step,
                LONGEST,
            )
        self.close()

    def close(self) -> None:
        if self.running:
            self.running.process.kill()
            self.running.process.wait()
            self.running.output.close()

    def _start(self, step: int, modality: str) -> None:
        probe = self.config.probe
        train, test = self.config.probes[modality]
        words = ["evaluate", probe.kind, str(self.run.checkpoint(step)), "--modality", modality]
        words += ["--train", train, "--test", test, "--label", probe.label]
        words += ["--layer", str(probe.layer)] if probe.layer else []
        output = (self.logs / f"probe-{step:08d}-{modality}.txt").open("w+", errors="replace")
        threads = str(probe.threads)
        process = subprocess.Popen(
            ["nice", "-n", "19", sys.executable, "-m", "d2v_ds", *words],
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            env={
                **{name: value for name, value in os.environ.items() if name not in OF_A_RANK},
                "CUDA_VISIBLE_DEVICES": "",
                "OMP_NUM_THREADS": threads,
                "MKL_NUM_THREADS": threads,
            },
        )
        self.running = _Running(step, modality, process, output)

    def _report(self, ended: _Running) -> None:
        ended.output.seek(0)
        lines = ended.output.read().strip().splitlines()
        ended.output.close()
        if ended.process.returncode:
            reason = lines[-1] if lines else f"exit code {ended.process.returncode}"
            log.warning("the probe of checkpoint %d failed: %s", ended.step, reason)
            return
        try:
            [accuracy] = json.loads(lines[-1])["accuracy"]["trained student"].values()
        except (ValueError, LookupError, TypeError, AttributeError):
            reason = lines[-1] if lines else "no output"
            log.warning("the probe of checkpoint %d gave no result: %s", ended.step, reason)
            return
        log.info(
            "checkpoint %d: %s accuracy of %s %.1f %%",
            ended.step,
            self.config.probe.kind,
            ended.modality,
            100 * accuracy,
        )


# Variables of a rank, which the probe must not take for its own launcher.
OF_A_RANK = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_LOCALID"),
)
