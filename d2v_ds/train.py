"""Training: from a configuration to a finished or well-stopped run.

    config --set_up--> task, engine, EMA, loader --resume--> steps --> checkpoints, metrics
        --> DONE or STOPPED

Every rank runs it with the same arguments. Nothing here knows the modality or the ZeRO stage.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from d2v_ds import checkpoint
from d2v_ds.batch import StepBatch
from d2v_ds.config import Config, modality_of
from d2v_ds.config.decoding import dump_yaml, to_dict
from d2v_ds.config.resume import refuse_changes
from d2v_ds.data.cache.stage import own_copy
from d2v_ds.data.find_set import find_set, stream_tars
from d2v_ds.data.loader import Loader
from d2v_ds.data.loader.mixture import Mixture, divide_workers, shares_of
from d2v_ds.data.loader.quarantine import Quarantine
from d2v_ds.data.loader.stream import StreamLoader
from d2v_ds.distributed import process_group
from d2v_ds.distributed.collectives import on_all_ranks, own_rank
from d2v_ds.distributed.stop import StopFlag
from d2v_ds.distributed.world import World, cores_of_rank
from d2v_ds.engine import Engine, create_engine
from d2v_ds.engine.optimizer import param_groups
from d2v_ds.errors import UserError
from d2v_ds.files import write_atomically
from d2v_ds.modalities import create_modalities
from d2v_ds.pretrain import Pretrain, build_pretrain, resolved
from d2v_ds.run import environment, status
from d2v_ds.run.preflight import UnfitNodes
from d2v_ds.run.rank_check import check_ranks, tell_unfit, warn_of_too_few_cores
from d2v_ds.run.run_folder import Generation, RunFolder, claim_generation
from d2v_ds.run.telemetry import Telemetry
from d2v_ds.run.watchdog import Watchdog
from d2v_ds.schedules import learning_rate, teacher_decay
from d2v_ds.seeding import seed_torch
from d2v_ds.teacher import Ema

T = TypeVar("T")

log = logging.getLogger("d2v_ds")

MAX_SKIPPED = 20  # steps in a row with a non-finite gradient before the run is given up
FINISHED, UNHEALTHY = 0, 3  # exit codes; slurm/README.md has the others


@dataclass
class TrainState:
    """What a resumed run needs besides weights: all of it is in the checkpoint's manifest."""

    step: int = 0  # optimizer steps taken
    samples: int = 0  # seen, over all ranks
    units: Mapping[str, float] = field(default_factory=dict)  # seconds of audio, images, tokens of
    # them, by modality
    position: Mapping[str, Any] = field(default_factory=dict)  # of each source's loader

    def advance(self, batch: StepBatch) -> None:
        self.step += 1
        self.samples += batch.samples
        seen = self.units.get(batch.modality, 0.0) + batch.units
        self.units = {**self.units, batch.modality: seen}
        self.position = batch.position


@dataclass
class Training:
    """The parts of a run, as one rank holds them."""

    config: Config
    world: World
    run: RunFolder
    generation: Generation
    task: Pretrain
    engine: Engine
    ema: Ema
    shapes: dict[str, tuple[int, ...]]
    mixture: Mixture
    state: TrainState
    saver: checkpoint.Saver
    watchdog: Watchdog

    def shapes_by_side(self) -> dict[str, list[tuple[int, ...]]]:
        """Parameter shapes of the student and of the teacher."""
        return {
            side: [shape for name, shape in self.shapes.items() if name.startswith(side + ".")]
            for side in ("student", "teacher")
        }

    def save(self) -> None:
        """Begins a checkpoint of everything; all ranks together."""
        self.watchdog.mark("saving", self.state.step)
        self.saver.start(
            self.state.step,
            shards=self.engine.shards(),
            ema=self.ema.pieces,
            shapes=self.shapes,
            state={"train": dataclasses.asdict(self.state), "config": to_dict(self.config)},
        )
        self.watchdog.mark("training", self.state.step)

    def finish_saving(self) -> None:
        """Waits until the last checkpoint is there; all ranks together."""
        self.watchdog.mark("saving", self.state.step)
        self.saver.finish()
        self.watchdog.mark("training", self.state.step)


def train(config: Config, world: World, *, new: bool = False, allow: tuple[str, ...] = ()) -> int:
    """Trains until run.steps or until told to stop; the exit code.

    Goes on where the run folder's newest sound checkpoint ends. new: refuse a folder that has one.
    allow: settings that may differ from the checkpoint's. Raises UserError, on every rank alike.
    """
    config = resolved(config)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        alone = torch.cuda.device_count() == 1  # Slurm can show each rank its own GPU only
        device = torch.device("cuda", 0 if alone else world.local_rank)
    torch.set_num_threads(config.run.threads or cores_of_rank())
    process_group.init(world, device)
    try:
        with StopFlag(config.run_dir) as stop, Watchdog(world.rank, world.size) as watchdog:
            nodes = check_ranks(config, device)
            training = set_up(config, world, device, nodes, watchdog, new=new, allow=allow)
            with contextlib.closing(training.mixture):
                return run_steps(training, stop)
    except UnfitNodes as error:
        return tell_unfit(error)
    finally:
        process_group.shutdown()


def set_up(
    config: Config,
    world: World,
    device: torch.device,
    nodes: list[str],
    watchdog: Watchdog,
    *,
    new: bool,
    allow: tuple[str, ...],
) -> Training:
    """Builds every part, and restores them from the newest checkpoint where there is one. nodes:
    of each rank."""
    run = RunFolder(config.run_dir)
    found = checkpoint.newest_verified(run)
    if found:
        check_resume(config, run, found, new=new, allow=allow)
    generation = on_rank_0(lambda: claim(run))  # from here on no other start writes checkpoints
    log_to(run.log(generation, world.rank))
    watchdog.start(run, generation)
    warn_of_too_few_cores(config.data.workers)
    on_rank_0(lambda: checkpoint.clean(run))
    if on_rank_0(run.steps)[-1:] != ([found.step] if found else []):
        found = checkpoint.newest_verified(run)  # one was published, or given back its name
    state = TrainState(**found.state["train"]) if found else TrainState()
    mixture = create_mixture(config, world, state, watchdog)

    torch.manual_seed(config.run.seed)  # the same weights on every rank
    task = build_pretrain(config).train()
    shapes = {name: tuple(p.shape) for name, p in task.named_parameters()}  # ZeRO 3 hides them
    accumulation = config.batch.micro_batches // world.size
    engine, ema = create_parts(config, task, accumulation, device)
    if found:
        found.restore(engine.shards(), ema.pieces, shapes)
        engine.refresh()
        ema.publish()
        log.info("resuming at step %d from %s", state.step, found.path)
    on_rank_0(lambda: describe_run(config, run, nodes))
    saver = checkpoint.Saver(
        run,
        generation,
        keep=config.save.keep,
        keep_every=config.save.keep_every,
        replicated=engine.replicated,
    )
    return Training(
        config, world, run, generation, task, engine, ema, shapes, mixture, state, saver, watchdog
    )


def create_parts(
    config: Config, task: Pretrain, accumulation: int, device: torch.device
) -> tuple[Engine, Ema]:
    """What trains the task, with so many micro-batches of this rank in a step, and the average that
    its teacher is. All ranks together. Raises UserError."""
    tracked = task.tracked()
    averaged = set(tracked.values()).__contains__
    engine = create_engine(
        task,
        param_groups(task, task.part, averaged, decay_all=config.optim.decay_all),
        settings=config.engine,
        optim=config.optim,
        accumulation=accumulation,
        device=device,
    )
    return engine, Ema(engine, task.teacher, tracked, "teacher.")


def on_rank_0(action: Callable[[], T]) -> T:
    """Runs `action` on rank 0 alone; its result, or its error, on all ranks."""
    results: list[Any] = on_all_ranks(lambda: action() if own_rank() == 0 else None)
    result: T = results[0]
    return result


def claim(run: RunFolder) -> Generation:
    """This start becomes the run folder's owner."""
    job = os.environ.get("SLURM_JOB_ID", "local")
    restart = os.environ.get("SLURM_RESTART_COUNT", "0") if job != "local" else None
    return claim_generation(run, job, int(restart) if restart else None)


def check_resume(
    config: Config,
    run: RunFolder,
    found: checkpoint.Checkpoint,
    *,
    new: bool,
    allow: tuple[str, ...],
) -> None:
    """Raises UserError when this configuration must not go on from that checkpoint."""
    if new:
        raise UserError(
            f"{run.root} holds checkpoints up to step {found.step}, and --new was given; choose "
            "another run.dir, or leave --new away to go on"
        )
    allowed = refuse_changes(found.state["config"], to_dict(config), allow)
    if allowed:
        log.warning("resuming with changed settings, as allowed: %s", ", ".join(allowed))


def create_mixture(config: Config, world: World, state: TrainState, watchdog: Watchdog) -> Mixture:
    """The sources of the run, standing where `state` says. All ranks together."""
    modalities = create_modalities(config.modality)
    shares, loaders = shares_of(config), dict[str, Loader | StreamLoader]()
    for (source, path), workers in zip(
        config.sources.items(), divide_workers(config.data.workers, shares), strict=True
    ):
        modality = modalities[modality_of(source)]
        settings: dict[str, Any] = {
            "seed": config.run.seed,
            "size": config.batch_size(modality.name),
            "micro_batches": config.batch.micro_batches,
            "rank": world.rank,
            "world": world.size,
            "workers": workers,
            "position": state.position.get(source),
            "quarantine": Quarantine(
                RunFolder(config.run_dir).bad_samples(world.rank), config.data.max_bad
            ),
        }
        if tars := stream_tars(path):
            loaders[source] = StreamLoader(tars, modality, **settings)
        else:
            shards = find_set(path, modality.name)
            modality.check_set(shards.about)
            loaders[source] = Loader(own_copy(shards, watchdog), modality, **settings)
    return Mixture(loaders, shares, config.run.seed)


def describe_run(config: Config, run: RunFolder, nodes: list[str]) -> None:
    write_atomically(run.config, dump_yaml(config))
    write_atomically(run.environment, json.dumps(environment.describe(nodes), indent=1) + "\n")
    environment.keep_code(run.code)
    for marker in (run.stopped, run.done):  # how the last start ended
        marker.unlink(missing_ok=True)


def log_to(path: Path) -> None:
    """Everything that is logged goes to this rank's file; rank 0's to the console as well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.handlers = [handler]
    if own_rank() == 0:
        log.addHandler(logging.StreamHandler(sys.stdout))
    log.setLevel(logging.INFO)
    log.propagate = False


# ---------------------------------------------------------------------------------------- the loop


def run_steps(t: Training, stop: StopFlag) -> int:
    """The loop; the exit code."""
    state, config = t.state, t.config
    if own_rank() == 0:
        report(t)
    saved, skipped = state.step, 0
    with Telemetry(config, t.run, t.task.modalities, state.step, t.watchdog) as telemetry:
        while state.step < config.run.steps and not stop.agreed():
            t.saver.poll()
            step_batch = telemetry.next_batch(t.mixture, state.step)
            for batch in step_batch.micro_batches:
                seed_torch(config.run.seed, state.step, batch.index)
                with telemetry.forward():
                    loss, stats = t.engine(batch.to(t.engine.device), step_batch.masked_count)
                t.engine.backward(loss)
                telemetry.add(step_batch.modality, stats)
            lr = learning_rate(config.optim, config.run.steps, state.step)
            if not t.engine.step(lr, config.optim.weight_decay, step_batch.modality):
                skipped, telemetry.skipped = skipped + 1, telemetry.skipped + 1
                log.warning("step %d is not taken: its gradient is not finite", state.step)
                if skipped < MAX_SKIPPED:
                    continue
                log.error(
                    "%d steps in a row had no finite gradient: lower optim.lr, or look at the "
                    "samples %s",
                    skipped,
                    [batch.keys for batch in step_batch.micro_batches],
                )
                t.finish_saving()
                return UNHEALTHY
            skipped = 0
            state.advance(step_batch)
            decay = teacher_decay(config.teacher, state.step)
            t.ema.update(decay, step_batch.modality)
            telemetry.step_done(
                step_batch,
                state.step,
                state.samples,
                t.engine.grad_norm(),
                {"lr": lr, "weight_decay": config.optim.weight_decay, "decay": decay},
            )
            if state.step % config.save.every == 0:
                t.save()
                saved = state.step
    if state.step != saved:
        t.save()
    t.finish_saving()
    done = state.step >= config.run.steps
    reason = f"all {config.run.steps} steps" if done else stop.reason or "another rank was told to"
    on_rank_0(lambda: status.finish(t.run, t.generation, state.step, done=done, reason=reason))
    log.info("%s at step %d: %s", "finished" if done else "stopped", state.step, reason)
    return FINISHED


def report(t: Training) -> None:
    """What the run will be, before its first step: everything that was derived."""
    config = t.config
    sizes = {kind: sum(map(math.prod, shapes)) for kind, shapes in t.shapes_by_side().items()}
    log.info(
        "%s: %s parameters to train, %s averaged by the teacher; %s, %s on %s",
        config.run_dir,
        f"{sizes['student']:,}",
        f"{sizes['teacher']:,}",
        config.engine.config,
        t.engine.precision,
        t.engine.device.type,
    )
    steps = {name: config.batch_size(name) for name in t.task.modalities}
    log.info(
        "a step: up to %s in %d micro-batches, %d on each of %d ranks",
        " or ".join(f"{size:g} {t.task.modalities[name].unit}" for name, size in steps.items()),
        config.batch.micro_batches,
        config.batch.micro_batches // t.world.size,
        t.world.size,
    )
    for (source, loader), share in zip(t.mixture.loaders.items(), t.mixture.shares.of, strict=True):
        log.info(
            "%s: %s",
            f"an epoch of {source}, {float(share):.1%} of the steps"
            if len(t.mixture.loaders) > 1
            else "an epoch",
            loader.describe(),
        )
    for modality in t.task.modalities.values():
        for warning in modality.warnings():
            log.warning("%s", warning)
