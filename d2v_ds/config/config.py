"""The whole configuration of a run, and its checks beyond types.

`model.*` and `modality.NAME.*` are plain mappings here, because their types are in modules that
need torch (transformer.py, modalities/NAME.py); these check them. All checks raise UserError with
the path of the setting.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from d2v_ds.config.finetuning import FineTuning
from d2v_ds.config.sections import (
    BatchSize,
    Data,
    EngineSettings,
    Log,
    Optim,
    Probe,
    Run,
    Save,
    Target,
    TeacherSettings,
    Valid,
)
from d2v_ds.errors import UserError


@dataclass(frozen=True)
class Config:
    """The configuration of a run."""

    compat: Literal["none", "fairseq"] = "none"
    """fairseq: reproduce the original code, including the faults that this project corrects.
    docs/differences.md lists the settings that it changes."""

    init: str = ""
    """Weights that the run starts from: a run folder (its newest checkpoint), a checkpoint, an
    exported or imported folder, a Hugging Face folder, a fairseq .pt or a BEiT .pth. Read once,
    when the run starts; step, schedules, optimizer and EMA start anew. Empty: random weights."""

    init_from: Literal["student", "teacher", "nothing"] = "student"
    """The weights of init that are used. nothing: fine-tuning takes only the settings of the model,
    and starts from random weights (a baseline)."""

    init_skip: tuple[str, ...] = ()
    """Parameters that keep their initial values although init has them, as names or patterns with *
    (encoder.front_ends.vision.bias.table, predictors.*). Parameters whose shapes differ must be
    listed."""

    run: Run = field(default_factory=Run)
    data: Data = field(default_factory=Data)
    batch: BatchSize = field(default_factory=BatchSize)
    model: dict[str, Any] = field(default_factory=dict)
    target: Target = field(default_factory=Target)
    modality: dict[str, dict[str, Any]] = field(default_factory=dict)
    teacher: TeacherSettings = field(default_factory=TeacherSettings)
    optim: Optim = field(default_factory=Optim)
    finetune: FineTuning = field(default_factory=FineTuning)
    valid: Valid = field(default_factory=Valid)
    probe: Probe = field(default_factory=Probe)
    engine: EngineSettings = field(default_factory=EngineSettings)
    log: Log = field(default_factory=Log)
    save: Save = field(default_factory=Save)

    def __post_init__(self) -> None:
        validate(self)

    @property
    def run_dir(self) -> Path:
        """The run folder."""
        return Path(self.run.dir or f"runs/{self.run.name or 'run'}")

    @property
    def sources(self) -> dict[str, str]:
        """{source: shard set}, in the order in which ranks open them."""
        return self._by_source(self.data.shards)

    @property
    def probes(self) -> dict[str, tuple[str, str]]:
        """{modality: (training set, test set)} of the probe; empty without one."""
        if not self.probe.train:
            return {}
        train, test = self._by_source(self.probe.train), self._by_source(self.probe.test)
        return {name: (train[name], test[name]) for name in train if name in test}

    @property
    def valid_sources(self) -> dict[str, str]:
        """{source: held-out shard set}; empty without validation."""
        return self._by_source(self.data.valid) if self.data.valid else {}

    def _by_source(self, shards: str | dict[str, str]) -> dict[str, str]:
        return shards if isinstance(shards, dict) else dict.fromkeys(self.modality, shards)

    def batch_size(self, modality: str) -> float:
        """The size of a step of this modality, in its unit."""
        size = self.batch.size
        return size[modality] if isinstance(size, dict) else size


def modality_of(source: str) -> str:
    """The modality of a source: speech for speech/libri."""
    return source.partition("/")[0]


def validate(config: Config) -> None:
    """Checks across settings, except model.* and modality.*. decoding.py checks each by itself."""

    def require(condition: bool, path: str, message: str) -> None:
        if not condition:
            raise UserError(f"{path}: {message}")

    run, optim, save = config.run, config.optim, config.save
    require(
        optim.lr_end <= optim.lr,
        "optim.lr_end",
        f"must be in [0, optim.lr={optim.lr}], got {optim.lr_end}",
    )
    require(
        optim.warmup_steps <= run.steps,
        "optim.warmup_steps",
        f"must be in [0, run.steps={run.steps}], got {optim.warmup_steps}. Change one of them.",
    )
    require(
        save.keep_every % save.every == 0,
        "save.keep_every",
        f"must be 0 (off) or a multiple of save.every={save.every}, got {save.keep_every}",
    )
    require(
        bool(config.probe.train) == bool(config.probe.test),
        "probe",
        "needs both probe.train and probe.test",
    )
    if save.keep_best and config.data.valid:
        require(
            save.every % config.valid.every == 0,
            "save.every",
            f"must be a multiple of valid.every={config.valid.every} if save.keep_best is set, "
            f"got {save.every}",
        )
    validate_sources(config)


def validate_sources(config: Config) -> None:
    """Checks that settings given per source or per modality name sources and modalities of the
    run."""
    names, size = sorted(config.modality), config.batch.size
    given = [
        f"data.{key}.{source}"
        for key in ("shards", "valid")
        if isinstance(sets := getattr(config.data, key), dict)
        for source in sets
    ]
    for path in [
        *given,
        *(f"batch.size.{name}" for name in (size if isinstance(size, dict) else ())),
    ]:
        name = modality_of(path.split(".", 2)[2])
        if name not in names:
            raise UserError(
                f"{path}: no modality {name!r} in this run (it has: {', '.join(names)})"
            )
    validate_weights(config)


def require_one_each(config: Config) -> None:
    """Raises UserError if a run with several modalities lacks a batch size or a shard set for one
    of them."""
    names, shards, size = sorted(config.modality), config.data.shards, config.batch.size
    several = f"but the run has {len(names)} modalities; give one per modality, for example"
    for key, sets in (("shards", shards), ("valid", config.data.valid)):
        if isinstance(sets, str) and sets and len(names) > 1:
            raise UserError(f"data.{key}: is a single set, {several} data.{key}.{names[0]}={sets}")
    if not isinstance(size, dict) and len(names) > 1:
        raise UserError(f"batch.size: is a single number, {several} batch.size.{names[0]}={size:g}")
    for name in names:
        if isinstance(size, dict) and name not in size:
            raise UserError(f"batch.size.{name}: must be given (given: {', '.join(size)})")


def validate_weights(config: Config) -> None:
    """Checks that data.weights is empty or has a positive weight for every source."""
    weights, given = config.data.weights, [modality_of(source) for source in config.sources]
    # Preflight reports modalities without a shard set, so their weights are accepted here.
    sources = [*config.sources, *(name for name in config.modality if name not in given)]
    for source in weights:
        if source not in sources:
            raise UserError(
                f"data.weights.{source}: no such source in this run (it has: {', '.join(sources)})"
            )
    missing = [source for source in sources if source not in weights]
    if weights and missing:
        raise UserError(
            f"data.weights.{missing[0]}: must be given, because other sources have a weight "
            f"({', '.join(weights)})"
        )


def require_divisible(micro_batches: int, ranks: int) -> None:
    """Raises UserError if the number of ranks does not divide the micro-batches of a step."""
    if micro_batches % ranks == 0:
        return
    first = max(1, micro_batches // ranks)
    more = f"{ranks * first}, {ranks * (first + 1)} or {ranks * (first + 2)}"
    divisors = [str(n) for n in range(1, micro_batches + 1) if micro_batches % n == 0]
    fewer = " or ".join(filter(None, [", ".join(divisors[:-1]), divisors[-1]]))
    raise UserError(
        f"batch.micro_batches: {micro_batches} is not divisible by {ranks} ranks. Use {more}, "
        f"or {fewer} rank{'' if fewer == '1' else 's'}."
    )
