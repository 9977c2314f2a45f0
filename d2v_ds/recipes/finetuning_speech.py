"""Fine-tuning on transcripts of LibriSpeech, as published for wav2vec 2.0 and data2vec.

fairseq examples/wav2vec/config/finetuning/NAME.yaml, unless a comment states otherwise.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from d2v_ds.recipes.finetuning import NO_DROPOUT, Function, named

SAMPLE_RATE = 16_000


class Split(NamedTuple):
    """What the configurations differ in.

    A micro-batch of fairseq is the audio of one GPU, in millions of samples; a step has gpus x
    accumulation of them. phases: steps of warm-up, at the peak and of the decay of a tri-stage
    schedule; for a cosine the warm-up alone.
    """

    lr: float
    steps: int
    gpus: int
    million: float
    accumulation: int
    phases: tuple[int, ...]
    mask: float
    length: int
    channels: float
    layer_drop: float
    frozen: int
    mask_with: Literal["token", "zero", "noise"]
    beta2: float = 0.98


def wav2vec(
    lr: float,
    steps: int,
    gpus: int,
    million: float,
    accumulation: int,
    mask: float,
    channels: float,
    layer_drop: float,
    frozen: int,
) -> Split:
    """A configuration of wav2vec 2.0: phase_ratio [0.1, 0.4, 0.5], spans of 10, and the mask token
    that only encoders of 1.0 have."""
    phases = (steps // 10, 4 * steps // 10, 5 * steps // 10)
    batch = (lr, steps, gpus, million, accumulation)
    return Split(*batch, phases, mask, 10, channels, layer_drop, frozen, "token")


SPLITS = {
    "base_10m": wav2vec(5e-5, 13_000, 2, 3.2, 4, 0.65, 0.25, 0.1, 10_000),
    "base_1h": wav2vec(5e-5, 13_000, 2, 3.2, 4, 0.65, 0.25, 0.1, 10_000),
    "base_10h": wav2vec(5e-5, 20_000, 2, 3.2, 4, 0.65, 0.5, 0.05, 10_000),
    "base_100h": wav2vec(3e-5, 80_000, 2, 3.2, 4, 0.65, 0.5, 0.1, 0),
    "base_960h": wav2vec(1e-4, 320_000, 8, 3.2, 1, 0.5, 0.1, 0.1, 0),
    "vox_10m": wav2vec(1e-4, 13_000, 4, 1.28, 5, 0.65, 0.25, 0.1, 10_000),
    "vox_1h": wav2vec(3e-4, 13_000, 4, 1.28, 5, 0.75, 0.25, 0.1, 10_000),
    "vox_10h": wav2vec(1e-4, 20_000, 4, 1.28, 5, 0.75, 0.25, 0.1, 10_000),
    "vox_100h": wav2vec(3e-5, 80_000, 4, 1.28, 5, 0.5, 0.5, 0.1, 10_000),
    "vox_960h": wav2vec(3e-5, 320_000, 24, 1.28, 1, 0.5, 0.25, 0.1, 10_000),
    # The configurations from the time of 2.0. No file states which of them gave the published
    # numbers.
    "vox_10m_2": Split(
        2e-6, 10_000, 4, 1.0, 4, (1_000,), 0.4, 3, 0.25, 0.1, 100, "zero", beta2=0.95
    ),
    "vox_1h_2": Split(1e-5, 60_000, 8, 1.0, 1, (4_000,), 0.65, 5, 0.25, 0.1, 100, "noise"),
    "vox_10h_2": Split(2e-5, 60_000, 4, 1.28, 1, (8_000,), 0.5, 5, 0.1, 0.1, 100, "noise"),
    # The run ends 20,000 steps before its schedule.
    "vox_10h_aws": Split(
        2e-5, 60_000, 4, 1.28, 1, (8_000, 0, 72_000), 0.4, 5, 0.1, 0.1, 100, "noise"
    ),
    "vox_100h_2": Split(
        1e-5, 100_000, 8, 1.28, 1, (8_000, 0, 72_000), 0.4, 5, 0.1, 0.1, 100, "noise"
    ),
    "vox_100h_3": Split(1e-5, 100_000, 8, 1.0, 1, (8_000,), 0.4, 5, 0.1, 0.1, 100, "noise"),
    "vox_960h_2": Split(
        1e-5, 200_000, 16, 1.0, 1, (8_000, 0, 200_000), 0.4, 5, 0.1, 0.1, 100, "noise"
    ),
    "vox_960h_3": Split(1e-5, 200_000, 16, 1.0, 1, (8_000,), 0.4, 5, 0.1, 0.1, 100, "noise"),
}
HOURS = {"10m": "10 min", "1h": "1 h", "10h": "10 h", "100h": "100 h", "960h": "960 h"}


def ctc(split: Split) -> dict[str, Any]:
    """The settings of a row."""
    micro_batches = split.gpus * split.accumulation
    warmup, *rest = split.phases
    schedule: dict[str, Any] = {"schedule": "cosine"}
    if rest:
        schedule = {"schedule": "tri_stage", "hold_steps": rest[0], "decay_steps": rest[1]}
        schedule["decay_to"] = 0.05  # final_lr_scale
    return {
        "run": {"steps": split.steps},
        "batch": {
            "size": round(micro_batches * split.million * 1e6) / SAMPLE_RATE,
            "micro_batches": micro_batches,
        },
        "model": {**NO_DROPOUT, "activation_dropout": 0.1, "layer_drop": split.layer_drop},
        # fairseq wav2vec2_asr.py gives the prenet the same dropout and LayerDrop
        "modality": {"speech": {"prenet_dropout": 0.0, "prenet_layer_drop": split.layer_drop}},
        "finetune": {
            "task": "ctc",
            "label": "text",
            "freeze": "convolutions",  # feature_grad_mult: 0
            "freeze_steps": split.frozen,
            "time_mask": split.mask,
            "time_mask_length": split.length,
            "time_mask_with": split.mask_with,
            "channel_mask": split.channels,
            "channel_mask_length": 64,
        },
        "optim": {
            "lr": split.lr,
            "betas": [0.9, split.beta2],
            "eps": 1e-8,
            "weight_decay": 0.0,
            "clip": 0.0,
            "warmup_steps": warmup,
            **schedule,
        },
        "valid": {"every": 1_000},
        "save": {"every": 1_000, "keep": 1, "keep_best": 1},
    }


def summary(name: str, split: Split) -> str:
    corpus, hours, *_ = name.split("_")
    size = "a base" if corpus == "base" else "a large"
    version = "1.0" if split.mask_with == "token" else "2.0"
    kind = "cosine" if len(split.phases) == 1 else "tri-stage"
    return (
        f"CTC on {HOURS[hours]} of LibriSpeech, {size} encoder of {version}: {split.steps:,} "
        f"steps, {kind}."
    )


FUNCTIONS: list[Function] = [
    named(f"ctc_{name}", summary(name, split), ctc, split) for name, split in SPLITS.items()
]
