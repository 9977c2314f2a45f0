"""Compares LoaderWorkers with torch's DataLoader: same plan, reader and micro-batches, in order.

It converts the bundled corpora, makes JPEG images, and reads micro-batches of the size of the base
recipes, and smaller ones, as fast as possible. The variants alternate in one process. A part of
loader.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from synthetic import picture_bytes, write_set
from torch.utils.data import DataLoader, Dataset

from d2v_ds.batch import Batch
from d2v_ds.data.shard_format import ShardSet, open_set
from d2v_ds.loader.loader import Loader
from d2v_ds.loader.reading import Lot, Made, MicroBatches
from d2v_ds.loader.workers import PRELOADED, LoaderWorkers
from d2v_ds.modalities.base import Modality
from d2v_ds.modalities.speech import Speech, SpeechConfig
from d2v_ds.modalities.text import Text, TextConfig
from d2v_ds.modalities.vision import Vision, VisionConfig
from shards import samples
from shards.cli import main as d2v_shards

PATIENCE = 60.0
CONTEXT = multiprocessing.get_context("forkserver")


class Case(NamedTuple):
    title: str
    shards: ShardSet
    modality: Modality
    size: float  # of a micro-batch
    batches: int


class Measured(NamedTuple):
    rate: float  # batches per second
    trainer_ms: float  # CPU time of this process per batch
    worker_ms: float
    first: float  # seconds to the first batch, when the fork server runs
    memory: float  # of the workers, in MB (PSS)


# ------------------------------------------------------------------------------------- the variants


class Lots(Dataset[Any]):
    """Makes micro-batches in the workers of a DataLoader. arrays: they are sent as numpy arrays,
    through a pipe; otherwise as tensors, through /dev/shm."""

    def __init__(self, make: MicroBatches, arrays: bool) -> None:
        self.make, self.arrays = make, arrays

    def __getitem__(self, lot: Lot) -> Any:
        made = self.make(lot, lambda sample_id: None)
        return (_arrays(made.batch), made.bad) if self.arrays else made


def _arrays(batch: Batch) -> dict[str, Any]:
    fields = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    return {k: v.numpy() if isinstance(v, torch.Tensor) else v for k, v in fields.items()}


def _batch(item: tuple[dict[str, Any], Any]) -> Made:
    fields, bad = item
    tensors: Any = {
        k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in fields.items()
    }
    return Made(Batch(**tensors), bad)


def _same(item: Any) -> Any:
    return item


@contextlib.contextmanager
def data_loader(
    make: MicroBatches, lots: Iterator[Lot], workers: int, arrays: bool
) -> Iterator[tuple[Iterator[Made], list[int]]]:
    CONTEXT.set_forkserver_preload(PRELOADED)
    loader = DataLoader(
        Lots(make, arrays),
        batch_size=None,
        sampler=lots,
        num_workers=workers,
        multiprocessing_context=CONTEXT,
        prefetch_factor=2,
        collate_fn=_same,
        timeout=PATIENCE,
    )
    found: Any = iter(loader)
    try:
        yield (map(_batch, found) if arrays else found), [w.pid for w in found._workers]
    finally:
        found._shutdown_workers()


@contextlib.contextmanager
def loader_workers(
    make: MicroBatches, lots: Iterator[Lot], workers: int
) -> Iterator[tuple[Iterator[Made], list[int]]]:
    name = make.reader.name
    with closing(LoaderWorkers(make, lots, workers, name=name, patience=PATIENCE)) as found:
        yield found, found.pids


VARIANTS: dict[str, Callable[..., Any]] = {
    "LoaderWorkers": loader_workers,
    "DataLoader, tensors": partial(data_loader, arrays=False),
    "DataLoader, numpy arrays": partial(data_loader, arrays=True),
}


# ---------------------------------------------------------------------------------------- measuring


def lots_of(loader: Loader) -> Iterator[Lot]:
    for step in loader.plan.steps():
        masked = None if step.masked is None else step.masked[0]
        yield Lot(step.epoch, 0, step.lots[0], step.spare[0], masked)


def cpu_of(pids: list[int]) -> float:
    """The CPU time of these processes, in seconds."""
    ticks = 0
    for pid in pids:
        values = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(values[11]) + int(values[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def memory_of(pids: list[int]) -> float:
    found = 0
    for pid in pids:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            found += int(line.split()[1]) if line.startswith("Pss:") else 0
    return found / 1024


def measure(case: Case, variant: Callable[..., Any], workers: int) -> Measured:
    loader = Loader(case.shards, case.modality, seed=0, size=case.size, micro_batches=1)
    make = MicroBatches(loader.reader, case.modality, 0)
    start = time.perf_counter()
    with closing(loader), variant(make, lots_of(loader), workers) as (made, pids):
        next(made)
        first = time.perf_counter() - start
        for _ in range(4 * workers):
            next(made)
        start, own, theirs = time.perf_counter(), time.process_time(), cpu_of(pids)
        for _ in range(case.batches):
            next(made)
        seconds = time.perf_counter() - start
        own, theirs = time.process_time() - own, cpu_of(pids) - theirs
        per_batch = 1000 / case.batches
        memory = memory_of(pids)
    return Measured(case.batches / seconds, own * per_batch, theirs * per_batch, first, memory)


def make_cases(root: Path, scale: float) -> list[Case]:
    corpora = {
        "speech": ["speech", samples.path("speech") / "train.tsv", "--join", "speaker"],
        "vision": ["images", samples.path("images") / "train"],
        "text": ["text", samples.path("text") / "train.txt.gz", "--block", "512"],
    }
    corpora["speech"] += ["--join-seconds", "15"]
    corpora["text"] += ["--tokenizer", samples.path("text") / "tokenizer.model"]
    sets = {}
    for name, (family, source, *options) in corpora.items():
        arguments = map(str, (family, source, root / name, *options))
        with contextlib.redirect_stdout(io.StringIO()):
            assert d2v_shards(list(arguments)) == 0
        sets[name] = open_set(root / name)
    rng = np.random.default_rng(0)
    pictures = ((picture_bytes(rng), 500 * 375) for _ in range(round(200 * scale)))
    jpeg = write_set(root / "jpeg", "vision", "pixels", "jpg", pictures)
    short = Speech(SpeechConfig(crop_seconds=2.0, min_seconds=1.0))
    cases = [
        Case("speech, 8 s in crops of 2 s", sets["speech"], short, 8, 150),
        Case("speech, 62 s in crops of 20 s", sets["speech"], Speech(SpeechConfig()), 62.5, 40),
        Case("images, 16 PNG of 32 pixels", sets["vision"], Vision(VisionConfig()), 16, 60),
        Case("images, 16 JPEG of 500 x 375", jpeg, Vision(VisionConfig()), 16, 30),
        Case("text, 4,096 tokens", sets["text"], Text(TextConfig()), 4096, 200),
    ]
    return [case._replace(batches=round(case.batches * scale)) for case in cases]


def compare(root: Path, scale: float, repetitions: int) -> None:
    for case in make_cases(root, scale):
        for workers in (1, 2):
            found: dict[str, list[Measured]] = {name: [] for name in VARIANTS}
            for _ in range(repetitions):
                for name, variant in VARIANTS.items():
                    found[name].append(measure(case, variant, workers))
            show(f"{case.title}, {workers} worker{'s' * (workers > 1)}", found)


def show(title: str, found: dict[str, list[Measured]]) -> None:
    """Medians; the ratios are to the first variant."""
    print(f"\n{title}")
    print(f"{'':28}{'batches/s':>18}{'trainer ms':>12}{'worker ms':>18}{'first s':>9}{'MB':>6}")
    base = None
    for name, measured in found.items():
        m = Measured(*map(statistics.median, zip(*measured, strict=True)))
        base = base or m
        rate, worker = f"({m.rate / base.rate:.2f})", f"({m.worker_ms / base.worker_ms:.2f})"
        print(
            f"  {name:26}{m.rate:11.1f} {rate}{m.trainer_ms:12.2f}{m.worker_ms:11.1f} {worker}"
            f"{m.first:9.2f}{m.memory:6.0f}",
            flush=True,
        )
