"""Fine-tuning: the small settings for a laptop. The published ones are in finetuning_*.py.

The encoder's settings come from `init`; a recipe only has those that fine-tuning changes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Function = Callable[[], dict[str, Any]]


def named(
    name: str, summary: str, build: Callable[..., Any], *row: Any, **columns: Any
) -> Function:
    """A recipe of a row of a table: a function with this name and docstring that calls `build`."""

    def recipe() -> dict[str, Any]:
        raw: dict[str, Any] = build(*row, **columns)
        return raw

    recipe.__name__, recipe.__doc__ = name, summary
    return recipe


# Dropouts and LayerDrop of the encoder in fine-tuning, unless a recipe has others.
NO_DROPOUT = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}


def finetune_speech_tiny() -> dict[str, Any]:
    """CTC on letters for a laptop, with the encoder of speech_tiny."""
    # Not published: tuned on strings of spoken digits.
    return {
        "run": {"steps": 1000},
        "data": {"workers": 1},
        "batch": {"size": 16.0, "micro_batches": 2},
        "model": {**NO_DROPOUT, "activation_dropout": 0.1, "layer_drop": 0.0},
        "modality": {"speech": {"prenet_dropout": 0.0}},
        "finetune": {
            "task": "ctc",
            "label": "text",
            "freeze_steps": 100,
            "time_mask": 0.5,
            "time_mask_length": 5,
            "time_mask_with": "zero",
            "channel_mask": 0.1,
            "channel_mask_length": 16,
            "head_lr": 2.0,
        },
        "optim": {
            "lr": 1e-3,
            "betas": [0.9, 0.98],
            "eps": 1e-8,
            "weight_decay": 0.0,
            "warmup_steps": 100,
            "schedule": "tri_stage",
            "decay_steps": 500,
            "decay_to": 0.05,
            "clip": 1.0,
        },
        "valid": {"every": 200},
        "log": {"every": 10, "pictures_every": 1000},
        "save": {"every": 200, "keep": 1, "keep_best": 1},
    }


def finetune_vision_tiny() -> dict[str, Any]:
    """Image classification for a laptop, with the encoder of vision_tiny."""
    # Not published: tuned on CIFAR-10.
    return {
        "run": {"steps": 400},
        "data": {"workers": 1},
        "batch": {"size": 64.0, "micro_batches": 2},
        "model": {**NO_DROPOUT, "drop_path": 0.1},
        "modality": {"vision": {"crop_scale": [0.36, 1.0]}},
        "finetune": {
            "task": "classification",
            "layer_decay": 0.75,
            "label_smoothing": 0.1,
            "mixup": 0.2,
        },
        "optim": {
            "lr": 2e-3,
            "betas": [0.9, 0.95],
            "eps": 1e-8,
            "weight_decay": 0.05,
            "warmup_steps": 40,
            "clip": 4.0,
        },
        "valid": {"every": 100},
        "log": {"every": 10, "pictures_every": 1000},
        "save": {"every": 100, "keep": 1, "keep_best": 1},
    }


def finetune_text_tiny() -> dict[str, Any]:
    """Text classification for a laptop, with the encoder of text_tiny."""
    # Not published: tuned on SST-2.
    return {
        "run": {"steps": 400},
        "data": {"workers": 1},
        "batch": {"size": 32.0, "micro_batches": 2},
        "model": {**NO_DROPOUT, "dropout": 0.1, "attention_dropout": 0.1},
        "modality": {"text": {"dropout": 0.1}},
        "finetune": {"task": "classification", "pool": "mean", "bos_id": None},
        "optim": {
            "lr": 5e-4,
            "betas": [0.9, 0.98],
            "eps": 1e-6,
            "weight_decay": 0.1,
            "warmup_steps": 40,
            "schedule": "linear",
            "clip": 1.0,
        },
        "valid": {"every": 100},
        "log": {"every": 10, "pictures_every": 1000},
        "save": {"every": 100, "keep": 1, "keep_best": 1},
    }
