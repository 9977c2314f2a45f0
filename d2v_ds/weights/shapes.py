"""Settings that follow from the shapes of a model's tensors, which have our names.

D width, H heads, C channels.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

Tensors = Mapping[str, Tensor]
Settings = dict[str, Any]

BLOCK = "encoder.trunk.blocks.0"


class Missing(ValueError):
    """A tensor without which nothing can be said about the model; the message is the rest of a
    sentence about the file."""


def shape(tensors: Tensors, name: str) -> tuple[int, ...]:
    if name not in tensors:
        raise Missing(f"lacks {name}")
    return tuple(tensors[name].shape)


def count(tensors: Tensors, prefix: str) -> int:
    """The number of modules in the list `prefix`."""
    found = (re.match(re.escape(prefix) + r"\.(\d+)\.", name) for name in tensors)
    return 1 + max((int(match[1]) for match in found if match), default=-1)


def model_settings(tensors: Tensors, modality: str) -> Settings:
    """The settings `model.*` that shapes determine."""
    (D,) = shape(tensors, f"{BLOCK}.norm1.weight")
    hidden = shape(tensors, f"{BLOCK}.ffn.fc1.weight")[0]
    ratio = hidden / D
    settings: Settings = {
        "dim": D,
        "depth": count(tensors, "encoder.trunk.blocks"),
        "mlp_ratio": ratio if int(D * ratio) == hidden else math.nextafter(ratio, math.inf),
    }
    if f"{BLOCK}.attention.q_bias" in tensors:
        settings["qkv_bias"] = "qv"
    if f"{BLOCK}.branch1.scale" not in tensors:
        settings["layer_scale"] = 0.0
    front_end = f"encoder.front_ends.{modality}"
    if f"{front_end}.bias.table" in tensors:
        settings["heads"] = shape(tensors, f"{front_end}.bias.table")[1]
    scale = tensors.get(f"{front_end}.bias.scale")
    if scale is not None and len(scale) > 1:  # otherwise one for all heads
        settings["heads"] = len(scale)
    return settings


def modality_settings(tensors: Tensors, modality: str, pad_id: int) -> Settings:
    """The settings `modality.NAME.*` that shapes determine. pad_id: of text."""
    (D,) = shape(tensors, f"{BLOCK}.norm1.weight")
    front_end = f"encoder.front_ends.{modality}"
    extra = tensors.get(f"{front_end}.extra.embedding")
    settings: Settings = {
        "prenet_depth": count(tensors, f"{front_end}.context.prenet.blocks"),
        "extra_tokens": 0 if extra is None else len(extra) // D,
    }
    own = {"speech": speech, "vision": vision, "text": text}[modality]
    return settings | own(tensors, front_end, D, pad_id) | predictor(tensors, modality, D)


def speech(tensors: Tensors, front_end: str, D: int, pad_id: int) -> Settings:
    _, channels, kernel = shape(tensors, f"{front_end}.positions.convs.0.weight")
    return {
        "alibi": f"{front_end}.bias.scale" in tensors,
        "positions": {
            "depth": count(tensors, f"{front_end}.positions.convs"),
            "kernel": kernel,
            "groups": D // channels,
        },
    }


def convolutions(tensors: Tensors) -> list[tuple[int, int]]:
    """(channels, kernel) of the convolutions of speech. Strides leave no trace in shapes."""
    prefix = "encoder.front_ends.speech.features.convs"
    shapes = [shape(tensors, f"{prefix}.{i}.weight") for i in range(count(tensors, prefix))]
    return [(channels, kernel) for channels, _, kernel in shapes]


def vision(tensors: Tensors, front_end: str, D: int, pad_id: int) -> Settings:
    patch = shape(tensors, f"{front_end}.features.proj.weight")[-1]
    if f"{front_end}.features.positions" in tensors:
        side = math.isqrt(shape(tensors, f"{front_end}.features.positions")[0])
        return {"patch_size": patch, "image_size": patch * side, "positions": "sincos"}
    rows = shape(tensors, f"{front_end}.bias.table")[0]  # (2 * side - 1)^2 + 3
    side = (math.isqrt(rows - 3) + 1) // 2
    return {"patch_size": patch, "image_size": patch * side, "positions": "relative"}


def text(tensors: Tensors, front_end: str, D: int, pad_id: int) -> Settings:
    rows = shape(tensors, f"{front_end}.features.positions.weight")[0]
    return {
        "vocab_size": shape(tensors, f"{front_end}.features.tokens.weight")[0],
        "max_tokens": rows - pad_id - 1,
    }


def predictor(tensors: Tensors, modality: str, D: int) -> Settings:
    """The settings of the decoder or the head; empty if the file has none."""
    prefix = f"predictors.{modality}"
    linears = sum(bool(re.match(rf"{prefix}\.proj\.(\d+\.)?weight", name)) for name in tensors)
    if not linears:
        return {}
    depth = count(tensors, f"{prefix}.convs")
    if not depth:
        return {"head": {"layers": linears}}
    dim, channels, kernel = shape(tensors, f"{prefix}.convs.0.weight")[:3]
    decoder = {"dim": dim, "depth": depth, "kernel": kernel, "groups": D // channels}
    return {"decoder": decoder | {"projection": linears}}
