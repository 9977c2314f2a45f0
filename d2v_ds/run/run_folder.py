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

import contextlib
import json
import logging
import os
import re
import shutil
import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from d2v_ds.data.tokenizer_json import JSON_FILE, SENTENCEPIECE_FILE
from d2v_ds.errors import Superseded
from d2v_ds.files import write_atomically
from d2v_ds.records import read_object

log = logging.getLogger("d2v_ds")

STEP_FOLDER = re.compile(r"[0-9]{8,18}")
PARTIAL = re.compile(r"\.[0-9]{8,18}\.([0-9]{1,18})\.tmp")  # a checkpoint that is being written


@dataclass(frozen=True)
class Generation:
    """One start of a run."""

    number: int  # 1 for the first start of the run
    job: str  # the Slurm job, or `local`
    restart: int  # the number of times that this job was requeued
    process: str  # HOST:PID of rank 0: distinguishes two starts that claimed simultaneously

    @staticmethod
    def decode(found: Mapping[str, Any] | None) -> Generation | None:
        """From GENERATION; None if it is damaged."""
        kinds = {"number": int, "job": str, "restart": int, "process": str}
        if found is None or {name: type(value) for name, value in found.items()} != kinds:
            return None
        return Generation(**found)

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
        """Steps of the published checkpoints, ascending, valid or not. Files and folders with other
        names are none."""
        if not self.checkpoints.is_dir():
            return []
        with os.scandir(self.checkpoints) as entries:
            names = [e.name for e in entries if STEP_FOLDER.fullmatch(e.name) and e.is_dir()]
        return sorted(step for name in names if self.checkpoint(step := int(name)).name == name)


def claim_generation(run: RunFolder, job: str, restart: int | None = None) -> Generation:
    """Makes this start the owner of the run folder; rank 0 calls it once, before anything is read.

    restart: Slurm's restart count; None: one more than that of the job's last start. Raises
    Superseded if a later restart of the same job has already claimed the folder.
    """
    last = read_generation(run)
    if last is None and run.generation.exists():
        log.warning("%s: is damaged; it is written again", run.generation)
    last_restart = last.restart if last and last.job == job else -1
    if restart is None:
        restart = last_restart + 1
    if restart < last_restart:
        raise Superseded(
            f"{run.root} is owned by {last}: restart {restart} is older than the owner"
        )
    process = f"{socket.gethostname()}:{os.getpid()}"
    number = 1 + (last.number if last else _last_number(run))
    generation = Generation(number, job, restart, process)
    run.root.mkdir(parents=True, exist_ok=True)
    if run.generation.is_dir():
        run.generation.rename(run.generation.with_name(f"GENERATION.{os.getpid()}.damaged"))
    write_atomically(run.generation, json.dumps(asdict(generation)) + "\n")
    _take_over(run)
    _set_marks_aside(run, generation)
    return generation


def _last_number(run: RunFolder) -> int:
    """The highest generation of which the run folder has traces, if GENERATION is damaged."""
    numbers = [0]
    for path in run.heartbeat.glob("rank*.json"):
        with contextlib.suppress(FileNotFoundError):
            number = (read_object(path) or {}).get("generation")
            numbers += [number] if type(number) is int else []
    for path in run.checkpoints.glob(".*.tmp"):
        if found := PARTIAL.fullmatch(path.name):
            numbers.append(int(found[1]))
    return max(numbers)


def _take_over(run: RunFolder) -> None:
    """Replaces metrics and event files by copies: an older start may still hold the originals open,
    and its later writes are lost with them."""
    for path in (run.metrics, *run.tensorboard.glob("events.*")):
        aside = path.with_name(f".{os.getpid()}.tmp")
        try:
            if path.is_file():
                shutil.copy2(path, aside)
                os.replace(aside, path)
        except OSError as error:
            log.warning("%s: an older start may still write to it (%s)", path, error.strerror)
            with contextlib.suppress(OSError):
                aside.unlink(missing_ok=True)


def _set_marks_aside(run: RunFolder, generation: Generation) -> None:
    """Removes the heartbeats of earlier starts, which may have had more ranks, and renames the mark
    of a hang that an earlier start with the same folder of logs has left."""
    for path in run.heartbeat.glob("rank*.json"):
        remove(path)
    hung = run.logs(generation) / "hung"
    with contextlib.suppress(FileNotFoundError):
        os.rename(hung, hung.with_name(f"hung.before.{generation.number}"))


def remove(path: Path) -> None:
    """Removes a file, link or folder, if it exists. Raises OSError."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def read_generation(run: RunFolder) -> Generation | None:
    """The owner of the run folder; None before the first start, or if GENERATION is damaged."""
    try:
        return Generation.decode(read_object(run.generation))
    except FileNotFoundError:
        return None


def refuse_superseded(run: RunFolder, generation: Generation) -> None:
    """Raises Superseded unless `generation` still owns the run folder. If GENERATION is damaged,
    nobody else has claimed the folder: a claim replaces it as a whole."""
    owner = read_generation(run)
    if owner == generation or (owner is None and run.generation.exists()):
        return
    if owner is None:
        raise Superseded(
            f"{run.generation} is missing: the run folder was moved or removed while {generation} "
            "was running"
        )
    raise Superseded(f"{run.root} is owned by {owner}; {generation} may not write into it")
