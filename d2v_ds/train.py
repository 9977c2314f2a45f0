"""Training: from a configuration to a finished or cleanly stopped run.

    start.py --> task, engine, EMA, data --> train_step (step.py), repeated
        --> checkpoints, metrics --> DONE or STOPPED

Every rank runs it with the same arguments. This file does not depend on the task, the modality or
the ZeRO stage.
"""

from __future__ import annotations

import contextlib
import logging
import math
import traceback
from collections.abc import Iterator, Sequence

import torch

from d2v_ds.batch import StepBatch
from d2v_ds.checkpoint import Saver
from d2v_ds.config import Config
from d2v_ds.distributed import process_group, signals
from d2v_ds.distributed.collectives import on_rank_0, own_rank
from d2v_ds.distributed.stop import StopFlag
from d2v_ds.distributed.world import World, cores_of_rank
from d2v_ds.errors import Superseded, UserError
from d2v_ds.exit_codes import FINISHED, UNHEALTHY
from d2v_ds.run import status
from d2v_ds.run.logs import to_file_only
from d2v_ds.run.preflight import UnfitNodes
from d2v_ds.run.rank_check import check_ranks, report_unfit
from d2v_ds.run.watchdog import Watchdog
from d2v_ds.start import start
from d2v_ds.step import StepSettings, train_step
from d2v_ds.task import Task
from d2v_ds.telemetry import Counts, Telemetry
from d2v_ds.training import Training

log = logging.getLogger("d2v_ds")

MAX_SKIPPED = 20  # consecutive steps with a non-finite gradient after which the run ends
RESCUE = 20.0  # seconds, after an error, to publish a checkpoint that was being written


def train(
    task_class: type[Task],
    config: Config,
    world: World,
    *,
    new: bool = False,
    allow: tuple[str, ...] = (),
) -> int:
    """Trains until run.steps or until asked to stop; returns the exit code.

    Resumes from the newest valid checkpoint in the run folder. new: refuse a folder that has one.
    allow: settings that may differ from the checkpoint's. Raises UserError on every rank.
    """
    device = torch.device("cpu")
    if torch.cuda.is_available():
        alone = torch.cuda.device_count() == 1  # Slurm can show each rank only its own GPU
        device = torch.device("cuda", 0 if alone else world.local_rank)
    torch.set_num_threads(config.run.threads or cores_of_rank())
    process_group.init(world, device)
    try:
        config = task_class.resolve(config)
        with (
            StopFlag(config.run_dir) as stop,
            Watchdog(world.rank, world.size) as watchdog,
            ends_are_told(watchdog) as saving,
        ):
            nodes = check_ranks(config, device)
            training = start(
                task_class, config, world, device, nodes, watchdog, new=new, allow=allow
            )
            saving.append(training.saver)
            with contextlib.closing(training):
                code = run_steps(training, stop)
                signals.ignore()
                return code
    except UnfitNodes as error:
        return report_unfit(error)
    finally:
        process_group.shutdown()


@contextlib.contextmanager
def ends_are_told(watchdog: Watchdog) -> Iterator[list[Saver]]:
    """An error that ends this rank is in its log and in its heartbeat, which `d2v-ds status` shows.
    Yields a list for a saver, whose checkpoint that was being written is published."""
    saving: list[Saver] = []
    try:
        yield saving
    except Exception as error:
        text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        to_file_only(logging.ERROR, f"the run ends: {text}")
        if isinstance(error, Superseded):
            raise
        if not isinstance(error, UserError):
            to_file_only(logging.ERROR, traceback.format_exc())
        for saver in saving:
            watchdog.mark("saving", saver.saved or 0)  # for which the batch script waits
            saver.rescue(RESCUE)
        watchdog.ended(text)
        raise


def run_steps(t: Training, stop: StopFlag) -> int:
    """The loop; returns the exit code."""
    state, config = t.state, t.config
    described = epochs(t) if own_rank() == 0 else []
    if described:
        report(t, described)
    skipped = 0
    counts = Counts(state.skipped, state.not_finite, dict(state.replaced))
    with Telemetry(config, t.run, t.task, state.step, t.watchdog, counts) as telemetry:
        counts = telemetry.counts
        if telemetry.writer:
            telemetry.writer.text("data", "\n".join(described), state.step)
        while not finished(t) and not stop.agreed():
            t.poll()
            if t.probing:
                t.probing.poll()
            step_batch = next_batch(t, telemetry)
            settings = StepSettings.of(config, state.step)
            active = t.task.begin_step(state.step, step_batch.modality)
            if not train_step(
                t.engine,
                t.ema,
                step_batch,
                settings,
                seed=config.run.seed,
                active=active,
                observer=telemetry,
            ):
                skipped += 1
                telemetry.step_skipped(step_batch)
                number = state.step + 1  # as in the metrics
                log.warning("step %d is skipped: its gradient is not finite", number)
                if skipped < MAX_SKIPPED:
                    continue
                give_up(t, step_batch, skipped)
                return UNHEALTHY
            skipped = 0
            state.advance(step_batch)
            with telemetry.not_counted():
                scores = t.validate()
            telemetry.step_done(
                step_batch, settings, state.step, state.samples, t.engine.grad_norm(), scores
            )
            if state.step % config.save.every == 0:
                t.save(counts)
    t.save_last(counts)
    done = finished(t)
    reason = done or stop.reason or "another rank was asked to stop"
    on_rank_0(
        lambda: status.finish(t.run, t.generation, state.step, done=bool(done), reason=reason)
    )
    log.info("%s at step %d: %s", "finished" if done else "stopped", state.step, reason)
    if done and t.probing:
        t.probing.finish(t.watchdog)
    return FINISHED


def finished(t: Training) -> str:
    """Why the run is finished; empty if it is not."""
    if t.state.step >= t.config.run.steps:
        return f"all {t.config.run.steps} steps"
    if t.judge.exhausted(t.state.best):
        return f"no better validation in {t.judge.patience}; {t.judge.describe(t.state.best)}"
    return ""


def next_batch(t: Training, telemetry: Telemetry) -> StepBatch:
    """The batch of the next step. Its time counts as waiting for data."""
    t.watchdog.mark("data", t.state.step)
    with telemetry.timed("data"):
        step_batch = t.mixture.next(t.state.step)
    t.watchdog.mark("training", t.state.step)
    return step_batch


def give_up(t: Training, step_batch: StepBatch, skipped: int) -> None:
    reason = f"{skipped} consecutive steps had no finite gradient"
    log.error(
        "%s: lower optim.lr, or inspect the samples %s",
        reason,
        [batch.keys for batch in step_batch.micro_batches],
    )
    t.finish_saving()
    t.watchdog.ended(reason)


def epochs(t: Training) -> list[str]:
    """One line per source: an epoch, and what the conversion of the set found."""
    several = len(t.mixture.loaders) > 1
    return [
        (f"an epoch of {source}, {float(share):.1%} of the steps" if several else "an epoch")
        + f": {loader.describe()}"
        for (source, loader), share in zip(
            t.mixture.loaders.items(), t.mixture.shares.of, strict=True
        )
    ]


def report(t: Training, described: Sequence[str]) -> None:
    """Logs the derived properties of the run before its first step. described: by `epochs`."""
    config, averages = t.config, t.task.averages()

    def size(names: set[str]) -> str:
        return f"{sum(math.prod(t.shapes[name]) for name in names):,}"

    averaged = f", {size(set(averages))} averaged by the teacher" if averages else ""
    log.info(
        "%s: %s parameters to train%s; %s, %s on %s",
        config.run_dir,
        size(t.shapes.keys() - averages.keys()),
        averaged,
        config.engine.config,
        t.engine.precision,
        t.engine.device.type,
    )
    sizes = {name: config.batch_size(name) for name in t.task.modalities}
    log.info(
        "a step: up to %s in %d micro-batches, %d on each of %d ranks",
        " or ".join(f"{n:g} {t.task.modalities[name].batch_unit}" for name, n in sizes.items()),
        config.batch.micro_batches,
        config.batch.micro_batches // t.world.size,
        t.world.size,
    )
    for line in described:
        log.info("%s", line)
    if t.validation:
        log.info("%s", t.validation.describe())
    for modality in t.task.modalities.values():
        for warning in modality.warnings():
            log.warning("%s", warning)
