"""Runs started the way users start them: the `train` command in its own processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from d2v_ds.checkpoint import open_checkpoint
from d2v_ds.checkpoint.format import EMA_KINDS, KINDS
from d2v_ds.run.run_folder import RunFolder


class Run:
    """One run folder and the command that trains in it."""

    def __init__(self, root: Path, recipe: str, *settings: str) -> None:
        self.folder, self.recipe = RunFolder(root), recipe
        self.settings = [f"run.dir={root}", *settings]

    def command(self, *more: str, nproc: int = 2) -> list[str]:
        words = ["train", self.recipe, *self.settings, *more, "--nproc", str(nproc)]
        return [sys.executable, "-m", "d2v_ds", *words]

    def train(self, *more: str, nproc: int = 2) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*more, nproc=nproc),
            capture_output=True,
            text=True,
            timeout=240,
            env=environment(),
        )

    def start(self, *more: str, nproc: int = 2) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command(*more, nproc=nproc),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment(),
        )

    def rows(self) -> list[dict[str, Any]]:
        if not self.folder.metrics.exists():
            return []
        lines = self.folder.metrics.read_text().split("\n")[:-1]
        return [json.loads(line) for line in lines]

    def losses(self) -> dict[int, float]:
        """The loss of every step; needs log.every=1."""
        steps = [row["step"] for row in self.rows()]
        assert steps == sorted(set(steps)), "rows overlap"
        losses = {}
        for row in self.rows():
            [losses[row["step"]]] = [v for name, v in row.items() if name.split("/")[0] == "loss"]
        return losses

    def wait_for_step(self, step: int, process: subprocess.Popen[str]) -> None:
        """Waits until `step` is logged; otherwise fails with all output of the run."""
        deadline = time.monotonic() + 180
        while not (rows := self.rows()) or rows[-1]["step"] < step:
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()  # its ranks end with it
                said = [process.communicate()[0]]
                said += [f.read_text() for f in self.folder.root.glob("logs/*/stacks-*.txt")]
                pytest.fail(f"no step {step}, exit code {process.poll()}\n" + "\n".join(said))
            time.sleep(0.05)


def environment() -> dict[str, str]:
    """If a rank hangs, the watchdog stops the run and writes the stacks of all ranks."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "D2V_HANG_SECONDS": "60"}


def ranks_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    children = psutil.Process(process.pid).children()
    return sorted(children, key=lambda child: int(child.environ()["RANK"]))


def assert_equal_runs(ours: Run, expected: Run) -> None:
    """Asserts that all losses and all tensors of the last checkpoint are bit-identical."""
    assert ours.losses() == expected.losses()
    step = expected.folder.steps()[-1]
    a, b = (open_checkpoint(run.folder.checkpoint(step)) for run in (ours, expected))
    for kind in KINDS:
        left, right = a.tensors(kind), b.tensors(kind)
        assert left.keys() == right.keys() and (left or kind in EMA_KINDS)  # without a teacher
        assert all(left[name].equal(right[name]) for name in left), kind
    assert a.adam_steps == b.adam_steps
    assert a.state["train"] == b.state["train"]
