"""The sections of a run's configuration: frozen dataclasses, a docstring under each setting.

`d2v-ds settings` prints these docstrings, and docs/configuration.md is generated from them. The
types behind `model.*` and `modality.NAME.*` live with their modules (transformer.py,
modalities/NAME.py), so these two stay plain mappings here. Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from d2v_ds.config.validation import validate

Normalisation = Literal["instance", "layer", "none"]


@dataclass(frozen=True)
class Run:
    """The run as a whole."""

    dir: str = ""
    """The run folder; empty: runs/NAME. Running again with the same folder resumes."""

    name: str = ""
    """A name for people; a recipe's name by default."""

    seed: int = 0
    """Seeds the weights, the order of the data, crops, masks, dropout and noise."""

    steps: int = 1000
    """Optimizer steps, which is also the length of the learning-rate schedule."""

    threads: int = 0
    """torch threads per rank; 0: the number of cores that the rank has."""


@dataclass(frozen=True)
class Data:
    """Which shard sets a run reads, and how.

    A source is a modality, or MODALITY/CORPUS where a modality has several corpora: speech/libri.
    """

    shards: str | dict[str, str] = ""
    """One shard set, or {source: shard set}. A shard set is a folder, a URL prefix, a folder of
    third-party tars, or a URL pattern of tars to stream."""

    weights: dict[str, float] = field(default_factory=dict)
    """{source: its share of the steps}, in any unit; empty: equal shares."""

    workers: int = 2
    """Loader processes per rank, divided among the sources, at least one for each; 0: decode in the
    training process."""

    max_bad: float = 0.001
    """The share of unusable samples above which a run ends."""


@dataclass(frozen=True)
class BatchSize:
    """The batch of one optimizer step. It does not depend on the number of ranks."""

    size: float | dict[str, float] = 60.0
    """The size of a whole optimizer step in the modality's unit: seconds of audio, images or
    tokens. With several modalities {modality: size}."""

    micro_batches: int = 1
    """The number of micro-batches that a step is cut into; the number of ranks must divide it."""


@dataclass(frozen=True)
class Target:
    """How the teacher's top layers become the regression target (Baevski et al. 2022, section
    3.3)."""

    top_k: int = 8
    """The number of top blocks that are averaged."""

    layer_norm: Normalisation = "instance"
    """Normalisation of each block's output before the average: instance (over tokens), layer (over
    channels) or none."""

    final_norm: Normalisation = "none"
    """Normalisation of the average."""

    source: Literal["ffn", "block"] = "ffn"
    """What a block contributes: its FFN output before the residual connection, or its output."""


@dataclass(frozen=True)
class Teacher:
    """The exponential moving average (EMA) of the student's weights."""

    decay: float = 0.999
    """EMA decay at the start."""

    decay_end: float = 0.9999
    """EMA decay after anneal_steps."""

    anneal_steps: int = 30_000
    """Steps over which the decay rises linearly from decay to decay_end."""


@dataclass(frozen=True)
class Optim:
    """AdamW and the learning rate."""

    lr: float = 5e-4
    """The peak learning rate."""

    betas: tuple[float, float] = (0.9, 0.98)
    """Decay rates of Adam's two moments."""

    eps: float = 1e-6
    """Added to the denominator of Adam's update."""

    weight_decay: float = 0.01
    """Decoupled weight decay; biases, norms and scales are exempt (decay_all)."""

    clip: float = 0.0
    """The gradient norm above which gradients are scaled down; 0: no clipping."""

    warmup_steps: int = 1000
    """Steps of linear warm-up."""

    schedule: Literal["cosine", "tri_stage", "constant", "cosine_beit"] = "cosine"
    """The learning-rate schedule after the warm-up."""

    lr_end: float = 0.0
    """The final learning rate of both cosine schedules."""

    decay_all: bool = False
    """Apply weight decay to biases, norms and scales as well, as fairseq does in effect."""

    adam_eps: Literal["torch", "fairseq"] = "torch"
    """torch adds eps after the bias correction of the second moment, fairseq before it."""


@dataclass(frozen=True)
class EngineSettings:
    """What trains the model: plain torch on one process, or DeepSpeed ZeRO."""

    config: str = "zero2"
    """local, the name of a file in ds_configs (zero0 .. zero3, offload ...), or the path of a JSON
    file with ZeRO and communication settings."""

    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: bf16 on a GPU, fp32 on a CPU. fp16 needs a GPU."""


@dataclass(frozen=True)
class Log:
    """What a run reports."""

    every: int = 10
    """Steps between rows of metrics."""

    pictures_every: int = 500
    """Steps between pictures."""

    progress: bool = True
    """Show a progress bar on a terminal."""


@dataclass(frozen=True)
class Save:
    """Checkpoints."""

    every: int = 1000
    """Steps between checkpoints."""

    keep: int = 3
    """The number of newest checkpoints to keep."""

    keep_every: int = 0
    """Checkpoints at multiples of this step are kept permanently; 0: none. A multiple of
    save.every."""


@dataclass(frozen=True)
class Config:
    """The configuration of a run."""

    compat: Literal["none", "fairseq"] = "none"
    """fairseq: reproduce the original code where this project corrects it; docs/differences.md
    lists the settings it changes."""

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
        """The size of a step of this modality, in its unit."""
        size = self.batch.size
        return size[modality] if isinstance(size, dict) else size
