"""The sections of a run's configuration: frozen dataclasses with a docstring under each setting.

`d2v-ds settings` prints these docstrings, and docs/configuration.md is generated from them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from d2v_ds.config.bounds import (
    Amount,
    BelowOne,
    Bounds,
    Count,
    Factor,
    MicroBatches,
    OffAmount,
    OffCount,
    Positive,
    PositiveShare,
    Processes,
    Seed,
    Share,
    Threads,
)

Normalisation = Literal["instance", "layer", "none"]


@dataclass(frozen=True)
class Run:
    """The run as a whole."""

    dir: str = ""
    """The run folder; empty: runs/NAME. Training again with the same folder resumes."""

    name: str = ""
    """The name of the run; empty: the recipe's name."""

    seed: Seed = 0
    """Seeds the weights, the order of the data, crops, masks, dropout and noise."""

    steps: Positive = 1000
    """Optimizer steps, also the length of the learning-rate schedule."""

    threads: Threads = 0
    """torch threads per rank; 0: one per core of the rank."""


@dataclass(frozen=True)
class Data:
    """The shard sets that a run reads.

    A source is a modality, or MODALITY/CORPUS if a modality has several corpora: speech/libri.
    """

    shards: str | dict[str, str] = ""
    """One value, or {source: value}. A value is a shard set (a folder, a URL prefix, or
    `pipe:COMMAND {}`), a folder of third-party tars, or tars at URLs, which are streamed."""

    valid: str | dict[str, str] = ""
    """Held-out shard sets, in the same form; empty: no validation."""

    weights: dict[str, Factor] = field(default_factory=dict)
    """{source: relative share of the steps}; need not sum to 1. Empty: equal shares."""

    workers: Processes = 2
    """Loader processes per rank, divided among the sources with at least one for each; 0: decode in
    the training process."""

    max_bad: Share = 0.001
    """The fraction of bad samples above which the run ends with an error."""


@dataclass(frozen=True)
class BatchSize:
    """The batch of one optimizer step. It does not depend on the number of ranks."""

    size: Factor | dict[str, Factor] = 60.0
    """The size of a whole optimizer step in the modality's unit: seconds of audio, images or
    tokens; texts in fine-tuning. With several modalities, {modality: size}."""

    micro_batches: MicroBatches = 1
    """The number of micro-batches per step. The number of ranks must divide it."""


@dataclass(frozen=True)
class Target:
    """The regression target, an average over the teacher's top blocks (Baevski et al. 2022, section
    3.3)."""

    top_k: Positive = 8
    """The number of top blocks that are averaged."""

    layer_norm: Normalisation = "instance"
    """Normalisation of each block's output before the average: instance (over tokens), layer (over
    channels) or none."""

    final_norm: Normalisation = "none"
    """Normalisation of the average."""

    source: Literal["ffn", "block"] = "ffn"
    """ffn: average the FFN outputs before the residual connection; block: the blocks' outputs."""


@dataclass(frozen=True)
class TeacherSettings:
    """The exponential moving average (EMA) of the student's weights."""

    decay: Share = 0.999
    """EMA decay at the start."""

    decay_end: Share = 0.9999
    """EMA decay after anneal_steps."""

    anneal_steps: Count = 30_000
    """Steps over which the decay rises linearly from decay to decay_end."""


@dataclass(frozen=True)
class Optim:
    """AdamW and the learning rate."""

    lr: Factor = 5e-4
    """The peak learning rate."""

    betas: tuple[BelowOne, BelowOne] = (0.9, 0.98)
    """Decay rates of Adam's two moments."""

    eps: Factor = 1e-6
    """Added to the denominator of Adam's update."""

    weight_decay: Amount = 0.01
    """Decoupled weight decay. Biases, norms and scales are exempt unless decay_all is set."""

    clip: OffAmount = 0.0
    """The gradient norm above which gradients are scaled down; 0: no clipping."""

    warmup_steps: Count = 1000
    """Steps of linear warm-up."""

    schedule: Literal["cosine", "tri_stage", "constant", "linear", "cosine_beit"] = "cosine"
    """The learning rate after the warm-up. cosine: half a cosine from lr to lr_end; linear: a line
    from lr to lr_end; tri_stage: lr for hold_steps, then exponential decay over decay_steps;
    constant: lr; cosine_beit: cosine, with a warm-up that is one step shorter, as in BEiT."""

    lr_end: Amount = 0.0
    """The final learning rate of the cosine and linear schedules."""

    hold_steps: Count | None = None
    """tri_stage: steps at the peak; null: those between the warm-up and the decay."""

    decay_steps: Count | None = None
    """tri_stage: steps of the decay; null: 7 % of the steps."""

    decay_to: PositiveShare = 0.01
    """tri_stage: the final learning rate, as a fraction of lr."""

    decay_all: bool = False
    """Apply weight decay to biases, norms and scales as well, as fairseq does in effect."""

    adam_eps: Literal["torch", "fairseq"] = "torch"
    """torch: add eps after the bias correction of the second moment; fairseq: before it."""


@dataclass(frozen=True)
class Valid:
    """Validation on the held-out sets of data.valid, in evaluation mode.

    Crops and masks are the same each time and for every run.seed, so values of different steps and
    runs can be compared.
    """

    every: Positive = 1000
    """Steps between validations; the last step is always validated."""

    samples: Annotated[int, Bounds(0, zero="all")] = 0
    """The number of samples of each set that are used, evenly spaced; 0: all."""


@dataclass(frozen=True)
class Probe:
    """A probe of each checkpoint's encoder on labelled sets, in a separate process while
    the run trains, on the CPU of rank 0's node. Several modalities: {modality: set}."""

    train: str | dict[str, str] = ""
    """The labelled shard sets that the probe is fitted on; empty: no probe."""

    test: str | dict[str, str] = ""
    """The labelled shard sets that are scored."""

    kind: Literal["knn", "ridge"] = "knn"
    """knn: nearest neighbours; ridge: ridge regression."""

    label: str = "label"
    """The key of the label in a sample's .json."""

    layer: Count = 0
    """The block that is probed, counted from 1; 0: the middle block."""

    threads: Annotated[int, Bounds(1, 4096)] = 1
    """CPU threads of the process, which has the lowest priority."""


@dataclass(frozen=True)
class EngineSettings:
    """The training engine: plain torch in one process, or DeepSpeed ZeRO."""

    config: str = "zero2"
    """local (plain torch), the name of a file in ds_configs (zero0 .. zero3, offload ...), or the
    path of a JSON file with ZeRO and communication settings."""

    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: bf16 on a GPU, fp32 on a CPU. fp16 needs a GPU."""


@dataclass(frozen=True)
class Log:
    """Metrics and pictures."""

    every: Positive = 10
    """Steps between rows of metrics."""

    pictures_every: Positive = 500
    """Steps between pictures in TensorBoard."""

    progress: bool = True
    """Show a progress bar on a terminal."""


@dataclass(frozen=True)
class Save:
    """Checkpoints."""

    every: Positive = 1000
    """Steps between checkpoints."""

    keep: Positive = 3
    """The number of newest checkpoints to keep."""

    keep_best: OffCount = 0
    """The number of best checkpoints to keep in addition, by save.best; 0: none. Without data.valid
    it has no effect. Only steps with a validation are compared, so save.every must be a multiple of
    valid.every."""

    best: str = ""
    """The scalar of a validation that decides which checkpoint is best: valid/loss, or a metric of
    fine-tuning. Empty: the metric of fine-tuning, else valid/loss."""

    keep_every: OffCount = 0
    """Checkpoints at multiples of this step are kept permanently; 0: none. Must be a multiple of
    save.every."""
