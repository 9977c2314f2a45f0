"""The run folder: where everything of a run is stored, and which process may write to it.

    RUN/
      config.yaml  environment.json        configuration; versions, hosts, variables
      init.json                            the parameters that were copied from `init`, by name
      code/HASH.tar.gz                     the code of each start, by its hash in environment.json
      logs/JOB.RESTART/rank00000.txt       one folder per start, one log per rank
      metrics.jsonl  tb/                   curves
      evaluations.jsonl                    results of `d2v-ds evaluate`, also in tb/eval/
      checkpoints/00000600/                see checkpoint/__init__.py
      heartbeat/rank00000.json             what each rank is doing, every few seconds
      bad_samples/rank00000.jsonl          samples that could not be used
      tokenizer.model or tokenizer.json    of the text set, for exports
      labels.model                         a copy of finetune.tokenizer
      GENERATION                           the start that owns the folder now
      STOP  STOPPED  DONE                  a request to stop; stopped and saved; finished

Every start of a run claims the folder and gets a generation number, one higher than the last. A
process that was cut off and replaced still has the lower number: it can publish nothing, and the
files that it holds open are replaced by copies. Imports no torch, so that a login node reads a run
quickly.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
from dataclasses import asdict, dataclass
from pathlib import Path

from d2v_ds.data.tokenizer_json import JSON_FILE, SENTENCEPIECE_FILE
from d2v_ds.errors import Superseded
from d2v_ds.files import write_atomically

STEP_FOLDER = re.compile(r"\d{8,}")


@dataclass(frozen=True)
class Generation:
    """One start of a run."""

    number: int  # 1 for the first start of the run
    job: str  # the Slurm job, or `local`
    restart: int  # the number of times that this job was requeued
    process: str  # HOST:PID of rank 0: distinguishes two starts that claimed simultaneously

    def __str__(self) -> str:
        return f"generation {self.number} (job {self.job}, restart {self.restart}, {self.process})"


@dataclass(frozen=True)
class RunFolder:
    """The paths of one run; creates nothing."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "config.yaml"

    @property
    def environment(self) -> Path:
        return self.root / "environment.json"

    @property
    def init(self) -> Path:
        return self.root / "init.json"

    @property
    def code(self) -> Path:
        return self.root / "code"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def evaluations(self) -> Path:
        return self.root / "evaluations.jsonl"

    @property
    def tensorboard(self) -> Path:
        return self.root / "tb"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def labels(self) -> Path:
        return self.root / "labels.model"

    @property
    def tokenizer(self) -> Path:
        """tokenizer.json if the run has one, otherwise tokenizer.model."""
        other = self.root / JSON_FILE
        return other if other.exists() else self.root / SENTENCEPIECE_FILE

    @property
    def heartbeat(self) -> Path:
        return self.root / "heartbeat"

    @property
    def generation(self) -> Path:
        return self.root / "GENERATION"

    @property
    def stop(self) -> Path:
        return self.root / "STOP"

    @property
    def stopped(self) -> Path:
        return self.root / "STOPPED"

    @property
    def done(self) -> Path:
        return self.root / "DONE"

    def logs(self, generation: Generation) -> Path:
        """The files of one start: logs, stack traces, findings of the batch script."""
        return self.root / "logs" / f"{generation.job}.{generation.restart}"

    def log(self, generation: Generation, rank: int) -> Path:
        """The log of one rank of one start."""
        return self.logs(generation) / f"rank{rank:05d}.txt"

    def bad_samples(self, rank: int) -> Path:
        """The bad samples of one rank."""
        return self.root / "bad_samples" / f"rank{rank:05d}.jsonl"

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"{step:08d}"

    def steps(self) -> list[int]:
        """Steps of the published checkpoints, ascending, valid or not."""
        if not self.checkpoints.is_dir():
            return []
        names = (path.name for path in self.checkpoints.iterdir())
        return sorted(int(name) for name in names if STEP_FOLDER.fullmatch(name))


def claim_generation(run: RunFolder, job: str, restart: int | None = None) -> Generation:
    """Makes this start the owner of the run folder; rank 0 calls it once, before anything is read.

    restart: Slurm's restart count; None: one more than that of the job's last start. Raises
    Superseded if a later restart of the same job has already claimed the folder.
    """
    last = read_generation(run)
    last_restart = last.restart if last and last.job == job else -1
    if restart is None:
        restart = last_restart + 1
    if restart < last_restart:
        raise Superseded(
            f"{run.root} is owned by {last}: restart {restart} is older than the owner"
        )
    process = f"{socket.gethostname()}:{os.getpid()}"
    generation = Generation(last.number + 1 if last else 1, job, restart, process)
    run.root.mkdir(parents=True, exist_ok=True)
    write_atomically(run.generation, json.dumps(asdict(generation)) + "\n")
    _take_over(run)
    return generation


def _take_over(run: RunFolder) -> None:
    """Replaces metrics and event files by copies: an older start may still hold the originals open,
    and its later writes are lost with them."""
    for path in (run.metrics, *run.tensorboard.glob("events.*")):
        if path.exists():
            aside = path.with_name(f".{os.getpid()}.tmp")
            shutil.copy2(path, aside)
            os.replace(aside, path)


def read_generation(run: RunFolder) -> Generation | None:
    """The owner of the run folder; None before the first start."""
    try:
        return Generation(**json.loads(run.generation.read_text()))
    except FileNotFoundError:
        return None


def refuse_superseded(run: RunFolder, generation: Generation) -> None:
    """Raises Superseded unless `generation` still owns the run folder."""
    owner = read_generation(run)
    if owner != generation:
        raise Superseded(f"{run.root} is owned by {owner}; {generation} may not write into it")
