"""Validation: the loss and the metrics on held-out sets while a run trains.

    data.valid --plan of one pass--> lots, dealt to the ranks --evaluation mode--> sums, outcomes
        --all ranks--> {valid_loss, valid_...}, the same on every rank

The plan, crops, masks and noise depend on the set alone, not on run.seed, the step, the ranks or
the workers. So a value is the same on any number of ranks and after a resume, up to the order of
fp64 sums, and values of different steps can be compared.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from d2v_ds.config import Config, modality_of
from d2v_ds.data.shard_format import ShardSet
from d2v_ds.distributed.collectives import all_gather
from d2v_ds.engine import Engine
from d2v_ds.errors import UserError
from d2v_ds.loader.find_set import find_set, stream_tars
from d2v_ds.loader.loader import PATIENCE, lengths_of, members_of
from d2v_ds.loader.plan import BatchPlan
from d2v_ds.loader.reading import Lot, Made, MicroBatches, Reader
from d2v_ds.loader.workers import LoaderWorkers
from d2v_ds.modalities.base import Modality
from d2v_ds.run.watchdog import Watchdog
from d2v_ds.seeding import seed_torch
from d2v_ds.task import Task
from d2v_ds.telemetry.metrics import Accumulator

log = logging.getLogger("d2v_ds")

SEED = 0  # of order, crops, masks and noise
Scalars = dict[str, float]


@dataclass(frozen=True)
class Turn:
    """One round of one rank."""

    number: int  # of the lot in the pass
    made: Made
    counts: bool


class HeldOut:
    """One held-out set: this rank's share of its micro-batches, in the same order each time."""

    def __init__(self, shards: ShardSet, modality: Modality, config: Config, rank: int, ranks: int):
        modality.check_set(shards.about)
        self.modality, self.rank, self.ranks = modality, rank, ranks
        size = config.batch_size(modality.name) / config.batch.micro_batches
        try:
            plan = BatchPlan(
                [lengths_of(shards, entry) for entry in shards.shards],
                modality,
                seed=SEED,
                size=size,
                micro_batches=1,
            )
        except UserError as error:
            raise UserError(str(error).replace("data.shards", "data.valid", 1)) from None
        self.lots = chosen(list(one_pass(plan)), config.valid.samples)
        self.samples = sum(len(lot.samples) for lot in self.lots)
        self.reader = Reader(shards, members_of(shards, modality))
        self.make = MicroBatches(self.reader, modality, SEED)
        mine = self.lots[rank::ranks]
        self.workers: LoaderWorkers | None = None
        self.made: Iterator[Made] = (
            self.make(lot, lambda sample: None) for lot in itertools.cycle(mine)
        )
        if config.data.workers and mine:  # they prepare the first lots of the next validation
            self.workers = LoaderWorkers(
                self.make, itertools.cycle(mine), 1, name=self.reader.name, patience=PATIENCE
            )
            self.made = self.workers

    def rounds(self) -> Iterator[Turn]:
        """The micro-batches of this rank. All ranks have the same number of rounds; a rank that has
        no lot left repeats one, which does not count."""
        made = None
        for first in range(0, len(self.lots), self.ranks):
            number = first + self.rank
            if number < len(self.lots):
                made = next(self.made)
                yield Turn(number, made, counts=True)
            else:
                made = made or self.make(self.lots[0], lambda sample: None)
                yield Turn(0, made, counts=False)

    def close(self) -> None:
        if self.workers:
            self.workers.close()
        self.reader.close()


def one_pass(plan: BatchPlan) -> Iterator[Lot]:
    """The lots of the first epoch."""
    for step in plan.steps():
        if step.epoch:
            return
        masked = None if step.masked is None else step.masked[0]
        yield Lot(0, 0, step.lots[0], step.spare[0], masked)


def chosen(lots: list[Lot], samples: int) -> list[Lot]:
    """Evenly spaced lots with about this number of samples; 0: all lots."""
    total = sum(len(lot.samples) for lot in lots)
    if not samples or samples >= total:
        return lots
    number = max(1, round(len(lots) * samples / total))
    return [lots[i * len(lots) // number] for i in range(number)]


class Validation:
    """The held-out sets of a run. Every rank creates one; data.valid must not be empty. Raises
    UserError."""

    def __init__(
        self, config: Config, task: Task, engine: Engine, watchdog: Watchdog, rank: int, ranks: int
    ) -> None:
        self.task, self.engine, self.watchdog = task, engine, watchdog
        self.every = config.valid.every
        self.sets = {}
        for source, path in config.valid_sources.items():
            if stream_tars(path):
                raise UserError(f"data.valid: {path}: tars at URLs without an index cannot be used")
            modality = task.held_out(modality_of(source))
            shards = find_set(path, modality.name)
            self.sets[source] = HeldOut(shards, modality, config, rank, ranks)

    def due(self, step: int, last: int) -> bool:
        return step % self.every == 0 or step == last

    def describe(self) -> str:
        sizes = (f"{held.samples} of {source}" for source, held in self.sets.items())
        return f"validation every {self.every} steps: {', '.join(sizes)} samples"

    def run(self, step: int) -> Scalars:
        """The scalars of every set: valid_NAME, or valid_NAME/SOURCE and the mean valid_loss if
        there are several. The same on every rank. Collective: all ranks must call it."""
        rows = {source: self._validate(held, step) for source, held in self.sets.items()}
        if len(rows) == 1:
            [row] = rows.values()
            return {f"valid_{name}": value for name, value in row.items()}
        several = {
            f"valid_{name}/{source}": value
            for source, row in rows.items()
            for name, value in row.items()
        }
        mean = sum(row["loss"] for row in rows.values()) / len(rows)
        return {**several, "valid_loss": mean}

    def _validate(self, held: HeldOut, step: int) -> Scalars:
        accumulator, terms, bad = Accumulator(), 0, 0
        outcomes: list[tuple[int, list[Any]]] = []
        for turn in held.rounds():
            self.watchdog.mark("validating", step)
            batch = turn.made.batch.to(self.engine.device)
            seed_torch(SEED, 0, turn.number)
            _, sums = self.engine.evaluate(batch, 1)  # on all ranks, as ZeRO 3 gathers weights
            found = self.task.outcomes(batch, sums)
            if turn.counts:
                terms, bad = terms + batch.terms, bad + len(turn.made.bad)
                outcomes.append((turn.number, found))
            else:
                sums = {name: torch.zeros_like(value) for name, value in sums.items()}
            accumulator.add(sums)
        return self._scalars(accumulator, terms, bad, outcomes)

    def _scalars(
        self, accumulator: Accumulator, terms: int, bad: int, outcomes: list[tuple[int, list[Any]]]
    ) -> Scalars:
        ranks = all_gather((terms, bad, outcomes))
        sums = dict(accumulator.reduce())
        sums["loss"] = sums["loss"] / max(1, sum(terms for terms, _, _ in ranks))
        groups = dict(pair for _, _, pairs in ranks for pair in pairs)  # by the number of the lot
        scores = self.task.score([one for number in sorted(groups) for one in groups[number]])
        return {
            **self.task.report.summarize(sums, 1),
            **scores,
            "bad": float(sum(bad for _, bad, _ in ranks)),
        }

    def close(self) -> None:
        for held in self.sets.values():
            held.close()
