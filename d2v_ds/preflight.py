"""What can be checked about a run before torch is imported: most mistakes answer in a moment."""

from __future__ import annotations

from d2v_ds.config import Config, load_engine_config
from d2v_ds.errors import UserError
from d2v_ds.run_folder import RunFolder
from d2v_ds.shard_format import open_set


def check(config: Config, ranks: int) -> None:
    """Raises UserError for settings, shard sets, ranks and run folders that do not fit together."""
    require_divisible(config.batch.micro_batches, ranks)
    load_engine_config(config.engine.config)
    if config.engine.config == "local" and ranks > 1:
        raise UserError(
            f"engine.config: local runs on one rank, this run has {ranks}; use zero0 .. zero3"
        )
    if not config.modality:
        raise UserError("modality: a run needs at least one, for example modality.speech")
    for name in config.modality:
        require_shards(config, name)
    run = RunFolder(config.run_dir)
    if run.stop.exists():
        raise UserError(f"{run.stop} asks this run to stop; remove it to go on")
    if run.root.exists() and not run.root.is_dir():
        raise UserError(f"run.dir: {run.root} is a file, not a folder")


def require_shards(config: Config, modality: str) -> None:
    """Raises UserError unless a sound shard set of the modality is named."""
    shards = config.data.shards
    if not shards:
        raise UserError(
            f"data.shards: must name a shard set, for example data.shards=/data/{modality}; make "
            f"one with `d2v-shards {modality} SOURCE OUT`"
        )
    if isinstance(shards, dict) and modality not in shards:
        raise UserError(f"data.shards.{modality}: must be given (has: {', '.join(sorted(shards))})")
    open_set(config.shards_of(modality), modality)


def require_divisible(micro_batches: int, ranks: int) -> None:
    """Raises UserError when the micro-batches of a step cannot be shared evenly."""
    if micro_batches % ranks == 0:
        return
    first = max(1, micro_batches // ranks)
    more = f"{ranks * first}, {ranks * (first + 1)} or {ranks * (first + 2)}"
    divisors = [str(n) for n in range(1, micro_batches + 1) if micro_batches % n == 0]
    fewer = " or ".join(filter(None, [", ".join(divisors[:-1]), divisors[-1]]))
    raise UserError(
        f"batch.micro_batches: {micro_batches} is not divisible by {ranks} ranks. Use {more}, "
        f"or {fewer} ranks."
    )
