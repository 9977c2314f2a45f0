"""Small models of the six variants of the objective, and batches with masks chosen by the test."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from d2v_ds import recipes, seeding
from d2v_ds.batch import Batch, mask_indices
from d2v_ds.config import Config
from d2v_ds.modalities import speech, text
from d2v_ds.modalities.base import Modality
from d2v_ds.pretrain import Pretrain

CONVS = [[8, 10, 5], [8, 3, 2], *[[16, 3, 2]] * 3, *[[16, 2, 2]] * 2]
SMALL = ["model.dim=32", "model.depth=3", "target.top_k=2", "engine.config=local"]
SPEECH = [
    f"modality.speech.convs={CONVS}",
    "modality.speech.positions.groups=4",
    "modality.speech.min_seconds=0.1",
]
DECODER = ["decoder.dim=16", "decoder.groups=4", "decoder.zero_last=false"]
# `shared` is as published
TEXT = ["shared=[features]", "vocab_size=50", "mask_id=49", "max_tokens=40"]


def under(section: str, settings: list[str]) -> list[str]:
    return [f"{section}.{setting}" for setting in settings]


RECIPES: dict[str, tuple[str, list[str]]] = {
    "v2_speech": (
        "speech_tiny",
        [*SPEECH, "modality.speech.views=3", *under("modality.speech", DECODER)],
    ),
    "v2_vision": (
        "vision_tiny",
        [
            "modality.vision.views=3",
            "modality.vision.prenet_depth=1",
            "modality.vision.cls_weight=0.1",
            *under("modality.vision", DECODER),
        ],
    ),
    "v2_text": (
        "text_tiny",
        ["modality.text.views=3", *under("modality.text", [*TEXT, *DECODER])],
    ),
    "v1_speech": ("speech_tiny_v1", [*SPEECH, "modality.speech.head.zero_last=false"]),
    "v1_vision": ("vision_tiny_v1", ["modality.vision.head.zero_last=false"]),
    "v1_text": (
        "text_tiny_v1",
        [
            "target.layer_norm=layer",
            *under("modality.text", [*TEXT, "mask.length=4", "head.zero_last=false"]),
        ],
    ),
}
VARIANTS = sorted(RECIPES)
RAGGED = [name for name in VARIANTS if "vision" not in name]  # all images have the same size


def config(variant: str, *overrides: str) -> Config:
    recipe, settings = RECIPES[variant]
    return recipes.load(recipe, [*SMALL, *settings, *overrides])


def build(variant: str, *overrides: str) -> Pretrain:
    torch.manual_seed(0)
    return Pretrain.create(config(variant, *overrides)).train()


def modality_of(task: Pretrain) -> Any:
    [modality] = task.modalities.values()
    return modality


def examples(task: Pretrain, *sizes: int) -> list[Any]:
    """Decoded samples. `sizes` are in approximate tokens and are ignored for images."""
    rng = np.random.default_rng(1)
    modality = modality_of(task)
    if modality.name == "speech":
        return [rng.standard_normal(320 * n + 80).astype(np.float32) for n in sizes]
    if modality.name == "text":
        return [rng.integers(4, 49, n) for n in sizes]
    side = modality.config.image_size
    return [rng.standard_normal((3, side, side)).astype(np.float32) for _ in sizes]


def tokens_of(modality: Any, example: Any) -> int:
    if modality.name == "speech":
        return speech.token_count(len(example), modality.config.convs)
    return len(example) if modality.name == "text" else int(np.prod(modality.config.grid))


def draw(task: Pretrain, samples: Sequence[Any]) -> list[Any]:
    """The modality's own masks, [M, T] for each sample."""
    modality = modality_of(task)
    rngs = [seeding.generator(0, i) for i in range(len(samples))]
    if modality.name == "vision":
        return [modality.draw_masks(rng) for rng in rngs]
    return [
        modality.draw_masks(tokens_of(modality, s), rng)
        for s, rng in zip(samples, rngs, strict=True)
    ]


def assemble(task: Pretrain, samples: Sequence[Any], masks: Sequence[Any]) -> Batch:
    """A batch of the given samples and masks [M, T]."""
    modality: Any = modality_of(task)
    fields: dict[str, Any] = mask_indices(masks, removed=modality.config.masked == "removed")
    if modality.name == "speech":
        fields["inputs"] = speech.pad(samples)
    elif modality.name == "vision":
        fields["inputs"] = torch.from_numpy(np.stack(samples))
    else:
        fields["inputs"] = text.pad(samples, modality.config.pad_id)
        if modality.config.masked == "replaced":
            corrupted = [
                np.where(view, modality.config.mask_id, sample)
                for sample, mask in zip(samples, masks, strict=True)
                for view in mask
            ]
            fields["corrupted"] = text.pad(corrupted, modality.config.pad_id)
    return Batch(modality=modality.name, index=0, views=len(masks[0]), **fields)


def batch_of(task: Pretrain, *sizes: int) -> Batch:
    """A batch collated by the modality itself."""
    modality: Modality = modality_of(task)
    rngs = [seeding.generator(0, i) for i in range(len(sizes))]
    return modality.collate(examples(task, *sizes), rngs, 0)
