"""Runs of `d2v-ds finetune`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.helpers.runs import Run

QUICK = ["data.workers=0", "optim.warmup_steps=2", "log.every=1", "run.threads=1"]
SOURCE = {"speech": "spoken", "vision": "vision", "text": "text"}
SIZES = {"speech": "batch.size=6", "vision": "batch.size=16", "text": "batch.size=12"}


class Tuning(Run):
    """A run of `d2v-ds finetune`."""

    def command(self, *more: str, nproc: int = 1) -> list[str]:
        words = ["finetune", self.recipe, *self.settings, *more, "--nproc", str(nproc)]
        return [sys.executable, "-m", "d2v_ds", *words]

    def tune(self, *more: str, nproc: int = 1) -> subprocess.CompletedProcess[str]:
        done = self.train(*more, nproc=nproc)
        assert done.returncode == 0, done.stderr
        return done


def tuning(root: Path, modality: str, sets: dict[str, Path], init: Path, *more: str) -> Tuning:
    data = sets[SOURCE[modality]]
    words = [f"data.shards={data}", f"init={init}", SIZES[modality], *QUICK, *more]
    return Tuning(root, f"finetune_{modality}_tiny", *words)
