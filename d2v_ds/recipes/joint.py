"""Speech, images and text in one trunk. Not published: data2vec's authors name it as the goal of
their work, but trained one model per modality."""

from __future__ import annotations

from typing import Any

from d2v_ds.recipes.speech import speech_base, speech_tiny
from d2v_ds.recipes.text import text_base, text_tiny
from d2v_ds.recipes.vision import vision_base, vision_tiny


def joint_base() -> dict[str, Any]:
    """data2vec 2.0 on speech, images and text in one trunk: 165 M parameters, 85 M shared."""
    raw = together(speech_base(), vision_base(), text_base())
    # The three recipes differ in the following settings. final_norm is taken from speech and text,
    # because vision's final LayerNorm only equalises the scale of the targets; top_k is between 8,
    # 10 and 12; dropout is taken from speech and text. Vision has no prenet, so that every modality
    # has twelve blocks.
    raw["target"] = {"top_k": 10, "layer_norm": "instance", "final_norm": "none", "source": "ffn"}
    raw["modality"]["vision"]["prenet_depth"] = 0
    raw["batch"]["micro_batches"] = 16  # speech micro-batches are half as long as in speech_base
    # Every step trains the trunk. Its learning rate is the geometric mean of the three; warm-up and
    # annealing take the same share of the steps as in vision_base.
    raw["teacher"] = {"decay": 0.9998, "decay_end": 0.99999, "anneal_steps": 475_000}
    raw["optim"] |= {"lr": 5e-4, "clip": 1.0, "warmup_steps": 60_000}
    return raw


def joint_tiny() -> dict[str, Any]:
    """data2vec 2.0 on speech, images and text for a laptop: 1.7 M parameters."""
    raw = together(speech_tiny(), vision_tiny(), text_tiny())
    # All modalities use the target and the optimizer of speech_tiny. text_tiny has the same ones,
    # except for the numbers of steps.
    raw["run"]["steps"] = 900
    raw["data"]["weights"] = {"speech": 1.0, "vision": 1.0, "text": 1.0}
    raw["teacher"]["anneal_steps"] = 675
    raw["optim"]["warmup_steps"] = 90
    return raw


def together(
    speech: dict[str, Any], vision: dict[str, Any], text: dict[str, Any]
) -> dict[str, Any]:
    """Combines three recipes: the modalities and batch sizes of each, and all other settings of
    `speech`. Each modality takes as many steps as in its own recipe."""
    alone = {"speech": speech, "vision": vision, "text": text}
    raw = speech
    steps = {name: one["run"]["steps"] for name, one in alone.items()}
    # On a shared trunk the scale of a loss is its weight. The text recipes sum the error over
    # channels, which would dominate the others, whose sum is divided by sqrt(channels).
    text["modality"]["text"]["loss_scale"] = None
    return raw | {
        "run": raw["run"] | {"steps": sum(steps.values())},
        "data": raw.get("data", {}) | {"weights": {name: float(n) for name, n in steps.items()}},
        "batch": raw["batch"]
        | {"size": {name: one["batch"]["size"] for name, one in alone.items()}},
        "modality": {name: one["modality"][name] for name, one in alone.items()},
    }
