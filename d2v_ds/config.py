"""The configuration of a run: frozen dataclasses, validation, what may change at a resume.

Imports no torch. The types behind `model.*` and `modality.NAME.*` live with their modules
(student.py, modalities/NAME.py), so these two stay plain mappings here and are decoded by whoever
builds them.
"""

from __future__ import annotations

import difflib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from d2v_ds.decoding import differences, value_at
from d2v_ds.errors import UserError
from d2v_ds.schedules import LEARNING_RATES


@dataclass(frozen=True)
class Run:
    dir: str = ""  # empty: runs/NAME
    name: str = ""
    seed: int = 0
    steps: int = 1000  # optimizer steps
    threads: int = 0  # of torch, per rank; 0: the cores of this rank


@dataclass(frozen=True)
class Data:
    """A source is a modality, or MODALITY/CORPUS where it has several: speech/libri."""

    shards: str | dict[str, str] = ""  # one shard set, or {source: its shard set}
    weights: dict[str, float] = field(default_factory=dict)  # {source: its share of the steps}, in
    # any measure; empty: equal
    workers: int = 2  # loader processes per rank, divided among the sources, of which each has one
    # at least; 0: decode in the training process
    max_bad: float = 0.001  # share of samples that cannot be used, above which a run ends


@dataclass(frozen=True)
class BatchSize:
    size: float | dict[str, float] = 60.0  # of a whole optimizer step, in the modality's unit
    # (seconds of audio, images, tokens); {modality: size} where a run has several
    micro_batches: int = 1  # into how many it is cut, whatever the ranks and the modality


@dataclass(frozen=True)
class Target:
    """How the teacher's top layers become the regression target (Baevski et al. 2022, section
    3.3)."""

    top_k: int = 8
    layer_norm: Literal["instance", "layer", "none"] = "instance"  # of each layer, before the mean
    final_norm: Literal["instance", "layer", "none"] = "none"  # of the mean
    source: Literal["ffn", "block"] = (
        "ffn"  # what of a block: FFN output before the residual, or its end
    )


@dataclass(frozen=True)
class Teacher:
    decay: float = 0.999
    decay_end: float = 0.9999
    anneal_steps: int = 30_000  # linear from decay to decay_end


@dataclass(frozen=True)
class Optim:
    lr: float = 5e-4
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    weight_decay: float = 0.01
    clip: float = 0.0  # global gradient norm; 0: no clipping
    warmup_steps: int = 1000
    schedule: Literal["cosine", "tri_stage", "constant", "cosine_beit"] = "cosine"
    lr_end: float = 0.0  # where the cosines end
    decay_all: bool = (
        False  # weight decay on biases, norms and scales too, as fairseq does in effect
    )
    adam_eps: Literal["torch", "fairseq"] = "torch"  # fairseq adds eps before the bias correction


@dataclass(frozen=True)
class EngineSettings:
    config: str = "zero2"  # local, zero0 .. zero3, or a JSON file
    precision: Literal["auto", "fp32", "bf16", "fp16"] = (
        "auto"  # auto: bf16 on a GPU, fp32 on a CPU
    )


@dataclass(frozen=True)
class Log:
    every: int = 10  # steps between rows of metrics
    pictures_every: int = 500  # steps between pictures
    progress: bool = True  # a progress bar where the output is a terminal


@dataclass(frozen=True)
class Save:
    every: int = 1000  # steps
    keep: int = 3  # newest checkpoints kept
    keep_every: int = 0  # steps: a checkpoint each so many is kept for good; 0: none


@dataclass(frozen=True)
class Config:
    # fairseq: every flag by which a published checkpoint differs from ours (FAIRSEQ below)
    compat: Literal["none", "fairseq"] = "none"
    run: Run = field(default_factory=Run)
    data: Data = field(default_factory=Data)
    batch: BatchSize = field(default_factory=BatchSize)
    model: dict[str, Any] = field(default_factory=dict)
    target: Target = field(default_factory=Target)
    modality: dict[str, dict[str, Any]] = field(default_factory=dict)
    teacher: Teacher = field(default_factory=Teacher)
    optim: Optim = field(default_factory=Optim)
    engine: EngineSettings = field(default_factory=EngineSettings)
    log: Log = field(default_factory=Log)
    save: Save = field(default_factory=Save)

    def __post_init__(self) -> None:
        validate(self)

    @property
    def run_dir(self) -> Path:
        return Path(self.run.dir or f"runs/{self.run.name or 'run'}")

    @property
    def sources(self) -> dict[str, str]:
        """{source: its shard set}, in the order in which ranks open them."""
        shards = self.data.shards
        return shards if isinstance(shards, dict) else dict.fromkeys(self.modality, shards)

    def batch_size(self, modality: str) -> float:
        """Of a step of this modality, in its unit."""
        size = self.batch.size
        return size[modality] if isinstance(size, dict) else size


def modality_of(source: str) -> str:
    return source.partition("/")[0]


def validate(config: Config) -> None:
    """What no single field can tell. Raises UserError with the path of the setting."""

    def require(condition: bool, path: str, message: str) -> None:
        if not condition:
            raise UserError(f"{path}: {message}")

    run, optim, teacher = config.run, config.optim, config.teacher
    require(run.steps >= 1, "run.steps", f"must be at least 1, got {run.steps}")
    require(run.threads >= 0, "run.threads", f"must be 0 or more, got {run.threads}")
    require(
        config.data.workers >= 0, "data.workers", f"must be 0 or more, got {config.data.workers}"
    )
    require(
        0 <= config.data.max_bad <= 1,
        "data.max_bad",
        f"must lie in [0, 1], got {config.data.max_bad}",
    )
    require(
        config.batch.micro_batches >= 1,
        "batch.micro_batches",
        f"must be at least 1, got {config.batch.micro_batches}",
    )
    require(optim.lr > 0, "optim.lr", f"must be above 0, got {optim.lr}")
    require(
        0 <= optim.lr_end <= optim.lr,
        "optim.lr_end",
        f"{optim.lr_end} does not lie in 0 .. optim.lr={optim.lr}",
    )
    require(optim.clip >= 0, "optim.clip", f"must be 0 (off) or more, got {optim.clip}")
    require(
        all(0 <= beta < 1 for beta in optim.betas),
        "optim.betas",
        f"each in [0, 1), got {optim.betas}",
    )
    require(
        0 <= optim.warmup_steps <= run.steps,
        "optim.warmup_steps",
        f"{optim.warmup_steps} does not lie in 0 .. run.steps={run.steps}; change one of them",
    )
    for key in ("decay", "decay_end"):
        value = getattr(teacher, key)
        require(0 <= value <= 1, f"teacher.{key}", f"must lie in [0, 1], got {value}")
    require(teacher.anneal_steps >= 0, "teacher.anneal_steps", f"got {teacher.anneal_steps}")
    require(
        config.target.top_k >= 1, "target.top_k", f"must be at least 1, got {config.target.top_k}"
    )
    require(config.log.every >= 1, "log.every", f"must be at least 1, got {config.log.every}")
    require(config.save.every >= 1, "save.every", f"must be at least 1, got {config.save.every}")
    require(config.save.keep >= 1, "save.keep", f"must be at least 1, got {config.save.keep}")
    require(
        config.save.keep_every >= 0 and config.save.keep_every % config.save.every == 0,
        "save.keep_every",
        f"must be 0 (off) or a multiple of save.every={config.save.every}, "
        f"got {config.save.keep_every}",
    )
    validate_sources(config)


def validate_sources(config: Config) -> None:
    """Whether what is given by source or by modality is of the run's. Raises UserError."""
    names, size = sorted(config.modality), config.batch.size
    sizes = {f".{name}": s for name, s in size.items()} if isinstance(size, dict) else {"": size}
    sources = config.data.shards if isinstance(config.data.shards, dict) else {}
    given = [f"data.shards.{source}" for source in sources]
    for path in [*given, *(f"batch.size{name}" for name in sizes if name)]:
        name = modality_of(path.split(".", 2)[2])
        if name not in names:
            raise UserError(f"{path}: no modality {name!r} in this run (has: {', '.join(names)})")
    for name, number in sizes.items():
        if number <= 0:
            raise UserError(f"batch.size{name}: must be above 0, got {number:g}")
    validate_weights(config)


def require_one_each(config: Config) -> None:
    """Raises UserError unless each of several modalities has its own batch size and shard set."""
    names, shards, size = sorted(config.modality), config.data.shards, config.batch.size
    several = f"{len(names)} modalities; give one each for {', '.join(names)}, for example"
    if isinstance(shards, str) and shards and len(names) > 1:
        raise UserError(f"data.shards: one set for {several} data.shards.{names[0]}={shards}")
    if not isinstance(size, dict) and len(names) > 1:
        raise UserError(f"batch.size: one number for {several} batch.size.{names[0]}={size:g}")
    for name in names:
        if isinstance(size, dict) and name not in size:
            raise UserError(f"batch.size.{name}: must be given (has: {', '.join(size)})")


def validate_weights(config: Config) -> None:
    weights, given = config.data.weights, [modality_of(source) for source in config.sources]
    # Of a modality without a shard set more is told before the run begins.
    sources = [*config.sources, *(name for name in config.modality if name not in given)]
    for source, weight in weights.items():
        if source not in sources:
            raise UserError(
                f"data.weights.{source}: no such source in this run (has: {', '.join(sources)})"
            )
        if not 0 < weight < math.inf:
            raise UserError(f"data.weights.{source}: must be above 0, got {weight:g}")
    missing = [source for source in sources if source not in weights]
    if weights and missing:
        raise UserError(
            f"data.weights.{missing[0]}: must be given, as other sources have a weight "
            f"({', '.join(weights)})"
        )


MAY_CHANGE = (
    *("run.steps", "run.threads", "run.dir", "engine", "data.workers", "log", "save"),
    "data.max_bad",
    "model.checkpoint_activations",
)


def refuse_changes(
    old: dict[str, Any], new: dict[str, Any], allowed: tuple[str, ...] = ()
) -> list[str]:
    """Keys that differ between a checkpoint's configuration and this run's and are allowed by name.

    Raises UserError listing every other difference outside MAY_CHANGE.
    """
    changed = [
        key
        for key in differences(old, new)
        if not any(key == free or key.startswith(free + ".") for free in MAY_CHANGE)
    ]
    named = [k for k in changed if any(k == a or k.startswith(a + ".") for a in allowed)]
    refused = [k for k in changed if k not in named]
    if refused:
        shown = "; ".join(
            f"{key} was {value_at(old, key)!r}, is {value_at(new, key)!r}" for key in refused[:5]
        ) + ("; ..." if len(refused) > 5 else "")
        raise UserError(
            f"cannot resume with a changed configuration: {shown}. Set it back, choose another "
            f"run.dir, or pass --allow {refused[0]}"
        )
    return named


def learning_rate(optim: Optim, steps: int, n: int) -> float:
    """The learning rate of optimizer step n (from 0)."""
    return LEARNING_RATES[optim.schedule](n, optim.lr, optim.warmup_steps, steps, optim.lr_end)


# What compat=fairseq sets: as the original code runs, where the default here is corrected
# (docs/differences.md).
FAIRSEQ: dict[str, Any] = {
    "optim.decay_all": True,
    "optim.adam_eps": "fairseq",
    "modality.speech.padded_statistics": True,
    "modality.text.padded_statistics": True,
    "modality.vision.cls_views": None,
    "modality.text.text_teacher": "masked",
}


def apply_compat(raw: dict[str, Any], *, over: bool) -> None:
    """Writes what raw["compat"] stands for into the settings `raw`, for the modalities that it
    has; over: in place of what they say, else where they say nothing."""
    if raw.get("compat") != "fairseq":
        return
    for path, value in FAIRSEQ.items():
        *sections, key = path.split(".")
        if sections[0] == "modality" and sections[1] not in raw.get("modality", {}):
            continue
        if path.endswith("text_teacher") and masked_of(raw, "text") != "replaced":
            continue  # it is 1.0's
        section = raw
        for name in sections:
            section = section.setdefault(name, {})
        if over or key not in section:
            section[key] = value


def masked_of(raw: dict[str, Any], modality: str) -> str:
    return str(raw["modality"][modality].get("masked", "removed"))


# ------------------------------------------------------------------- files that the package carries


def resource(folder: str, name: str = "") -> Path:
    """A file of ds_configs/ or slurm/: inside the installed package, or beside it in a checkout."""
    import importlib.resources

    package = Path(str(importlib.resources.files("d2v_ds")))
    for root in (package, package.parent):
        if (root / folder).is_dir():
            return root / folder / name
    raise FileNotFoundError(f"{folder}/ is neither in the package nor beside it")


def engine_config_file(name: str) -> Path | None:
    """The JSON file behind engine.config; None for the local engine. Raises UserError."""
    if name == "local":
        return None
    folder = resource("ds_configs")
    known = sorted(p.stem for p in folder.glob("*.json"))
    path = folder / f"{name}.json" if name in known else Path(name)
    if not path.is_file():
        near = difflib.get_close_matches(name, ["local", *known], n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(
            f"engine.config: {name!r} is neither a JSON file nor one of local, "
            f"{', '.join(known)}{hint}"
        )
    return path


OWNED_BY_RUN = {
    "train_batch_size": "batch.size and batch.micro_batches",
    "train_micro_batch_size_per_gpu": "batch.size and batch.micro_batches",
    "gradient_accumulation_steps": "batch.micro_batches",
    "gradient_clipping": "optim.clip",
    "optimizer": "optim.*",
    "scheduler": "optim.schedule",
    "fp16": "engine.precision",
    "bf16": "engine.precision",
    "torch_autocast": "engine.precision",
}


def load_engine_config(name: str) -> dict[str, Any]:
    """The DeepSpeed settings behind engine.config, of ZeRO and communication. Raises UserError."""
    path = engine_config_file(name)
    if path is None:
        return {}
    try:
        raw = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: expected a JSON object")
    for key, owner in OWNED_BY_RUN.items():
        if key in raw:
            raise UserError(
                f"{path} sets {key}, but the run configuration owns it ({owner}). "
                "Remove it from the JSON."
            )
    return raw
