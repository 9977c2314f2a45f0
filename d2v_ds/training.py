"""The parts of a run on one rank, and saving them.

start.py --Training--> the loop (train.py) --save, validate--> checkpoints, scores
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections import ChainMap, Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from d2v_ds import checkpoint
from d2v_ds.best import Judge
from d2v_ds.config import Config
from d2v_ds.config.decoding import to_stored
from d2v_ds.distributed.collectives import all_gather
from d2v_ds.distributed.world import World
from d2v_ds.engine import Engine
from d2v_ds.loader.mixture import Mixture
from d2v_ds.loader.quarantine import Quarantine, count_lines
from d2v_ds.probing import Probing
from d2v_ds.run.run_folder import Generation, RunFolder
from d2v_ds.run.watchdog import Watchdog
from d2v_ds.task import Task
from d2v_ds.teacher import Ema
from d2v_ds.telemetry import Counts
from d2v_ds.train_state import TrainState
from d2v_ds.validation import Validation

log = logging.getLogger("d2v_ds")

LAST_SAVES, PAUSE = 12, 10.0  # attempts to save the last step, and seconds between them


@dataclass
class Training:
    """The parts of a run, as one rank holds them."""

    config: Config
    world: World
    run: RunFolder
    generation: Generation
    task: Task
    engine: Engine
    ema: Ema | None  # None: the task has no teacher
    shapes: dict[str, tuple[int, ...]]  # of every parameter, by name
    mixture: Mixture
    quarantines: Mapping[str, Quarantine]  # {source: its bad samples}
    found: Mapping[str, int]  # {source: bad samples that earlier starts found}
    validation: Validation | None  # None: no held-out sets
    judge: Judge
    state: TrainState
    saver: checkpoint.Saver
    probing: Probing | None  # rank 0, if the run has a probe
    watchdog: Watchdog

    def save(self, counts: Counts) -> None:
        """Begins a checkpoint of everything. counts: of this rank. If a checkpoint cannot be
        written, the log tells it and training goes on. Collective: all ranks must call it."""
        self.watchdog.mark("saving", self.state.step)
        self._tolerate(self.saver.finish)
        self._tolerate(lambda: self._begin_saving(counts))
        self.watchdog.mark("training", self.state.step)

    def poll(self) -> None:
        """Publishes a checkpoint that all ranks have written. Collective."""
        self._tolerate(self.saver.poll)

    def finish_saving(self) -> None:
        """Waits until a checkpoint that is being written is published. Collective."""
        self.watchdog.mark("saving", self.state.step)
        self._tolerate(self.saver.finish)
        self.watchdog.mark("training", self.state.step)

    def save_last(self, counts: Counts) -> None:
        """Waits until a checkpoint of this step is published, also for space on the disk.
        Collective. Raises CannotSave."""
        self.watchdog.mark("saving", self.state.step)
        self._tolerate(self.saver.finish)
        for attempt in range(1, LAST_SAVES + 1):
            if self.saver.saved == self.state.step:
                break
            try:
                self._begin_saving(counts)
                self.saver.finish()
            except checkpoint.CannotSave as error:
                if attempt == LAST_SAVES:
                    raise checkpoint.CannotSave(f"{error}. {self._what_is_saved()}") from None
                if attempt == 1:
                    log.error("%s; trying again for %g s", error, LAST_SAVES * PAUSE)
                time.sleep(PAUSE)
                self.watchdog.mark("saving", self.state.step)
        self.watchdog.mark("training", self.state.step)

    def _what_is_saved(self) -> str:
        end, saved = f"The run ends at step {self.state.step}", self.saver.saved
        if not saved:
            return f"{end}, and nothing is saved; the same command begins again"
        return f"{end}, but only step {saved} is saved; the same command continues from there"

    def _begin_saving(self, counts: Counts) -> None:
        self._count(counts)
        self.saver.start(
            self.state.step,
            partitions=self.engine.partitions(),
            ema=self.ema.pieces if self.ema else {},
            shapes=self.shapes,
            state={"train": dataclasses.asdict(self.state), "config": to_stored(self.config)},
        )

    def _tolerate(self, action: Callable[[], None]) -> None:
        """A save that fails ends no run: the next one may find space."""
        try:
            action()
        except checkpoint.CannotSave as error:
            saved = self.saver.saved
            log.error(
                "%s; training continues %s and tries again at the next save",
                error,
                "without a checkpoint" if saved is None else f"with checkpoint {saved}",
            )

    def _count(self, counts: Counts) -> None:
        """Sums what each rank has counted, for the checkpoint. Collective."""
        lists = self.run.bad_samples(self.world.rank)
        new = {source: q.new for source, q in self.quarantines.items() if q.new}
        own = (counts, new, {lists.name: count_lines(lists)} if lists.is_file() else {})
        ranks = all_gather(own)
        state = self.state
        state.skipped = sum(each.skipped for each, _, _ in ranks)
        state.not_finite = sum(each.not_finite for each, _, _ in ranks)
        state.replaced = dict(sum((Counter(each.bad) for each, _, _ in ranks), Counter()))
        found = sum((Counter(bad) for _, bad, _ in ranks), Counter(self.found))
        state.bad = dict(found)
        state.listed = {**state.listed, **dict(ChainMap(*(listed for _, _, listed in ranks)))}

    def validate(self) -> dict[str, float]:
        """The scalars of a validation, if one is due after this step. Collective: all ranks must
        call it."""
        step, last = self.state.step, self.config.run.steps
        if self.validation is None or not self.validation.due(step, last):
            return {}
        scores = self.validation.run(step)
        self.watchdog.mark("training", step)
        self.state.score = self.judge.score(scores)
        if self.state.score is not None:
            self.state.best = self.judge.progress(self.state.best, step, self.state.score)
        return scores

    def close(self) -> None:
        self.mixture.close()
        if self.validation:
            self.validation.close()
        if self.probing:
            self.probing.close()
