"""Small fine-tuning tasks on the encoders of variants.py, and samples with labels."""

from __future__ import annotations

import dataclasses
import io
import json
import wave
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from d2v_ds.config.finetuning import FineTuning
from d2v_ds.finetune import Finetune
from d2v_ds.finetune.labelled import Labelled
from d2v_ds.pretrain import Pretrain
from tests.helpers import variants

LETTERS = ("<blank>", "|", "a", "b", "c")
CLASSES = ("left", "right", "up")
Sample = dict[str, bytes]


def settings(variant: str, **changes: Any) -> FineTuning:
    task, labels = ("ctc", LETTERS) if "speech" in variant else ("classification", CLASSES)
    return FineTuning(**{"task": task, "labels": labels, **changes})


def build(variant: str, *overrides: str, **changes: Any) -> Finetune:
    """A task with the encoder of a variant. changes: of FineTuning."""
    config = Pretrain.resolve(variants.config(variant, *overrides))
    torch.manual_seed(0)
    return Finetune.create(dataclasses.replace(config, finetune=settings(variant, **changes)))


def reader(task: Finetune, training: bool = True) -> Labelled:
    """How the task reads samples."""
    found = task.modalities[task.name] if training else task.held_out(task.name)
    assert isinstance(found, Labelled)
    return found


def sample(variant: str, size: int, label: Any, seed: int = 0) -> Sample:
    """The members of a sample. size: about its number of tokens; ignored for images."""
    rng = np.random.default_rng(seed)
    about = {"json": json.dumps({"label": label, "path": f"file {seed}"}).encode()}
    buffer = io.BytesIO()
    if "speech" in variant:
        with wave.open(buffer, "wb") as file:
            file.setparams((1, 2, 16_000, 0, "NONE", ""))
            file.writeframes(rng.integers(-9999, 9999, 320 * size + 80).astype("<i2").tobytes())
        return {**about, "wav": buffer.getvalue()}
    if "text" in variant:
        np.save(buffer, rng.integers(4, 49, size).astype(np.uint16))
        return {**about, "npy": buffer.getvalue()}
    pixels = rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return {**about, "png": buffer.getvalue()}


def generators(number: int, seed: int = 0) -> list[np.random.Generator]:
    return [np.random.default_rng([seed, i]) for i in range(number)]


def batch_of(modality: Labelled, samples: Sequence[Sample], rng: bool = True) -> Any:
    """A batch of samples, decoded and collated as the loader does it."""
    rngs = generators(len(samples))
    examples = [modality.decode(s, r if rng else None) for s, r in zip(samples, rngs, strict=True)]
    return modality.collate(examples, rngs, 0)
