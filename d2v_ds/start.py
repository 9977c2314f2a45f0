"""Starting: a configuration becomes the parts of a run, fresh or resumed.

    config --start--> task, engine, EMA, data, saver   <--restore-- the newest valid checkpoint

Every rank calls it with the same arguments. This file does not depend on the modality or the ZeRO
stage.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from d2v_ds import checkpoint
from d2v_ds.best import Judge
from d2v_ds.config import Config, modality_of
from d2v_ds.config.decoding import decode, dump_yaml, to_dict, to_stored, without_secrets
from d2v_ds.config.resume import refuse_changes
from d2v_ds.data.cache.stage import open_copy, stage
from d2v_ds.data.shard_format import ShardSet
from d2v_ds.distributed.collectives import on_all_ranks, on_rank_0
from d2v_ds.distributed.world import World
from d2v_ds.engine import Engine
from d2v_ds.errors import UserError
from d2v_ds.files import write_atomically
from d2v_ds.loader.find_set import find_set, stream_tars
from d2v_ds.loader.loader import Loader
from d2v_ds.loader.mixture import Mixture, divide_workers, shares_of
from d2v_ds.loader.quarantine import Past, Quarantine, names_of
from d2v_ds.loader.stream import StreamLoader
from d2v_ds.loader.tokenizer_file import keep_tokenizer, refuse_mixed, refuse_other
from d2v_ds.modalities.base import Modality
from d2v_ds.probing import Probing
from d2v_ds.run import environment
from d2v_ds.run.logs import log_to
from d2v_ds.run.rank_check import warn_of_too_few_cores
from d2v_ds.run.run_folder import Generation, RunFolder, claim_generation, remove
from d2v_ds.run.watchdog import PATIENT, Watchdog
from d2v_ds.secrets import mask_values
from d2v_ds.step import create_engine_and_ema
from d2v_ds.task import Task
from d2v_ds.train_state import TrainState
from d2v_ds.training import Training
from d2v_ds.validation import Validation
from d2v_ds.weights import initialise, open_weights

log = logging.getLogger("d2v_ds")


def start(
    task_class: type[Task],
    config: Config,
    world: World,
    device: torch.device,
    nodes: list[str],
    watchdog: Watchdog,
    *,
    new: bool,
    allow: tuple[str, ...],
) -> Training:
    """Builds every part, and restores it from the newest valid checkpoint if there is one. nodes:
    the node of each rank. Raises UserError on every rank."""
    run = RunFolder(config.run_dir)
    found = checkpoint.newest_verified(run)
    if found:
        check_resume(task_class, config, run, found, new=new, allow=allow)
    generation = on_rank_0(lambda: claim(run))  # from here on, no older start can write checkpoints
    log_to(run.log(generation, world.rank), console=world.rank == 0)
    watchdog.start(run, generation)
    warn_of_too_few_cores(config.data.workers)
    newest = found.step if found else -1
    on_rank_0(lambda: checkpoint.clean(run, newest))
    if on_rank_0(run.steps)[-1:] != ([found.step] if found else []):
        found = checkpoint.newest_verified(run)  # one was published or restored in the meantime
        if found and found.step != newest:
            check_resume(task_class, config, run, found, new=new, allow=allow)
    state = TrainState.from_manifest(found.state.get("train")) if found else TrainState()

    texts = text_sets(config)
    refuse_mixed(texts)
    torch.manual_seed(config.run.seed)  # the same weights on every rank
    task = task_class.create(config).train()
    if config.init and not found:
        start_from_weights(task, config, run, texts)
    averages = task.averages()
    quarantines = create_quarantines(config, run, world, state)
    mixture = create_mixture(config, task.modalities, world, state, watchdog, quarantines)
    shapes = {name: tuple(p.shape) for name, p in task.named_parameters()}  # ZeRO 3 hides them
    lost = [n for n, p in task.named_parameters() if not p.requires_grad and n not in averages]
    assert not lost, f"neither trained nor averaged, so not in checkpoints: {lost}"
    engine, ema = create_engine_and_ema(
        task,
        settings=config.engine,
        optim=config.optim,
        accumulation=config.batch.micro_batches // world.size,
        device=device,
    )
    if found:
        found.restore(engine.partitions(), ema.pieces if ema else {}, shapes)
        engine.refresh()
        if ema:
            ema.publish()
        log.info("resuming at step %d from %s", state.step, found.path)
    on_rank_0(lambda: describe_run(config, run, nodes))
    saver = checkpoint.Saver(
        run,
        generation,
        keep=config.save.keep,
        keep_best=config.save.keep_best,
        keep_every=config.save.keep_every,
        replicated=engine.replicated,
    )
    saver.saved = state.step
    return Training(
        config=config,
        world=world,
        run=run,
        generation=generation,
        task=task,
        engine=engine,
        ema=ema,
        shapes=shapes,
        mixture=mixture,
        quarantines=quarantines,
        found=state.bad,
        validation=create_validation(config, task, engine, world, watchdog),
        judge=Judge.of(config, task.metric),
        state=state,
        saver=saver,
        probing=Probing(config, run, run.logs(generation), state.step)
        if config.probes and world.rank == 0
        else None,
        watchdog=watchdog,
    )


def create_validation(
    config: Config, task: Task, engine: Engine, world: World, watchdog: Watchdog
) -> Validation | None:
    """The held-out sets, if the run has any. Raises UserError."""
    if not config.data.valid:
        return None
    return Validation(config, task, engine, watchdog, world.rank, world.size)


def start_from_weights(
    task: Task, config: Config, run: RunFolder, texts: Sequence[ShardSet]
) -> None:
    """Copies the weights that config.init names into the task. texts: the sets of text, whose
    tokenizer must be that of the weights. Collective: all ranks must call it. Raises UserError."""
    if config.init_from == "nothing":
        log.info("init: only the settings of the model, from %s; weights are random", config.init)
        return
    weights = open_weights(config.init)
    settings = {
        "model": config.model,
        "modality": config.modality,
        "labels": config.finetune.labels,
    }
    done = initialise(task, weights, config.init_from, config.init_skip, settings)
    for line in done.lines():
        log.info("%s", line)
    if "encoder.front_ends.text.features.tokens.weight" in done.copied:
        refuse_other(weights.path, weights.files, texts)
    report = json.dumps(mask_values(done.as_json()), indent=1) + "\n"
    on_rank_0(lambda: write_atomically(run.init, report))


def claim(run: RunFolder) -> Generation:
    """Makes this start the owner of the run folder."""
    job = os.environ.get("SLURM_JOB_ID", "local")
    restart = os.environ.get("SLURM_RESTART_COUNT", "0") if job != "local" else None
    return claim_generation(run, job, int(restart) if restart else None)


def check_resume(
    task_class: type[Task],
    config: Config,
    run: RunFolder,
    found: checkpoint.Checkpoint,
    *,
    new: bool,
    allow: tuple[str, ...],
) -> None:
    """Raises UserError if this configuration must not resume from that checkpoint."""
    if new:
        raise UserError(
            f"{run.root} holds checkpoints up to step {found.step}, and --new was given; choose "
            "another run.dir, or omit --new to resume"
        )
    stored = with_defaults(task_class, found.state["config"])
    allowed = refuse_changes(without_secrets(stored), to_stored(config), allow)
    if allowed:
        log.warning("resuming with changed settings, as allowed: %s", ", ".join(allowed))


def with_defaults(task_class: type[Task], raw: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's configuration, with the defaults of settings that were added after it."""
    try:
        return to_dict(task_class.resolve(decode(Config, raw)))
    except UserError:  # a setting no longer exists: compare it as written
        return raw


def create_mixture(
    config: Config,
    modalities: Mapping[str, Modality],
    world: World,
    state: TrainState,
    watchdog: Watchdog,
    quarantines: Mapping[str, Quarantine] | None = None,
) -> Mixture:
    """The loaders of all sources, each at its cursor in `state`. Collective: all ranks must call
    it. Raises UserError."""
    quarantines = quarantines or {}
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
            "cursor": state.cursor.get(source),
            "quarantine": quarantines.get(source),
        }
        if tars := stream_tars(path):
            loaders[source] = StreamLoader(tars, modality, **settings)
        else:
            shards = find_set(path, modality.name)
            modality.check_set(shards.about)
            on_rank_0(partial(keep_tokenizer, shards, RunFolder(config.run_dir).tokenizer))
            loaders[source] = Loader(local_copy(shards, watchdog), modality, **settings)
    return Mixture(loaders, shares, config.run.seed)


def create_quarantines(
    config: Config, run: RunFolder, world: World, state: TrainState
) -> dict[str, Quarantine]:
    """The bad samples of each source, after those that earlier starts found up to `state`."""
    counted, reported = names_of(run.bad_samples(0).parent, state.listed)
    return {
        source: Quarantine(
            run.bad_samples(world.rank),
            config.data.max_bad,
            Past(
                state.read.get(source, 0) / world.size,
                state.bad.get(source, 0) / world.size,
                counted,
                reported,
            ),
        )
        for source in config.sources
    }


def text_sets(config: Config) -> list[ShardSet]:
    """The sets of text for training and validation, except tars that are streamed."""
    sources = [*config.sources.items(), *config.valid_sources.items()]
    paths = {path for source, path in sources if modality_of(source) == "text"}
    local = [path for path in sorted(paths) if not stream_tars(path)]
    return [find_set(path, "text", check_tars=False) for path in local]


def local_copy(shards: ShardSet, watchdog: Watchdog) -> ShardSet:
    """The set that this node reads: its own copy if D2V_STAGE names a folder, else `shards`. A
    remote set has a cache instead. Collective: all ranks must call it. Raises UserError on all."""
    folder = os.environ.get("D2V_STAGE")
    if not folder or shards.remote:
        return shards
    alive = partial(watchdog.mark, "copying shards", 0)

    def copy() -> Path | None:
        path = stage(shards, Path(folder), alive)
        watchdog.mark(PATIENT, 0)  # other nodes may take longer, and are watched by their own ranks
        return path

    own = on_all_ranks(copy)[watchdog.rank]
    watchdog.mark("starting", 0)
    return open_copy(shards, own) if own else shards


def describe_run(config: Config, run: RunFolder, nodes: list[str]) -> None:
    write_atomically(run.config, dump_yaml(config))
    # What is in the environment is not known, so only its owner may read what masking leaves of it.
    described = json.dumps(environment.describe(nodes), indent=1) + "\n"
    write_atomically(run.environment, described, mode=0o600)
    environment.keep_code(run.code)
    if config.finetune.tokenizer and not run.labels.exists():
        shutil.copyfile(config.finetune.tokenizer, run.labels)
    for marker in (run.stopped, run.done):  # of the previous start
        remove(marker)
