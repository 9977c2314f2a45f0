"""Speech, images and text in one trunk. Not published anywhere: data2vec's authors name it as the
goal of their work and trained one model a modality."""

from __future__ import annotations

from typing import Any

from d2v_ds.recipes.speech import speech_base, speech_tiny
from d2v_ds.recipes.text import text_base, text_tiny
from d2v_ds.recipes.vision import vision_base, vision_tiny


def joint_base() -> dict[str, Any]:
    """data2vec 2.0 on speech, images and text in one trunk: 165 M parameters, 85 M shared."""
    raw = together(speech_base(), vision_base(), text_base())
    # Where the three differ: final_norm is that of speech and text, the LayerNorm at vision's end
    # only evens out the targets' scale; top_k is between 8, 10 and 12. Dropout is that of speech
    # and text. Vision has no blocks of its own, so that every modality passes twelve.
    raw["target"] = {"top_k": 10, "layer_norm": "instance", "final_norm": "none", "source": "ffn"}
    raw["modality"]["vision"]["prenet_depth"] = 0
    raw["batch"]["micro_batches"] = 16  # so that of speech are half as long as in speech_base
    # The learning rate of the trunk, which takes every step, is the geometric mean of the three's;
    # warm-up and annealing take the share of the steps that they take in vision's.
    raw["teacher"] = {"decay": 0.9998, "decay_end": 0.99999, "anneal_steps": 475_000}
    raw["optim"] |= {"lr": 5e-4, "clip": 1.0, "warmup_steps": 60_000}
    return raw


def joint_tiny() -> dict[str, Any]:
    """data2vec 2.0 on speech, images and text for a laptop: 1.7 M parameters."""
    raw = together(speech_tiny(), vision_tiny(), text_tiny())
    # One target and one optimizer for all: those of speech_tiny, as text_tiny's are but for steps.
    raw["run"]["steps"] = 900
    raw["data"]["weights"] = {"speech": 1.0, "vision": 1.0, "text": 1.0}
    raw["teacher"]["anneal_steps"] = 675
    raw["optim"]["warmup_steps"] = 90
    return raw


def together(
    speech: dict[str, Any], vision: dict[str, Any], text: dict[str, Any]
) -> dict[str, Any]:
    """The recipes' modalities with their batches on the trunk of speech, whose settings stand for
    all else. Each takes as many steps as it does alone, which is its weight, too."""
    alone = {"speech": speech, "vision": vision, "text": text}
    raw = speech
    steps = {name: one["run"]["steps"] for name, one in alone.items()}
    # On one trunk a loss counts by its scale: text's is the sum over channels in its own recipes,
    # and would drown the others, which are divided by the square root of their number.
    text["modality"]["text"]["loss_scale"] = None
    return raw | {
        "run": raw["run"] | {"steps": sum(steps.values())},
        "data": raw.get("data", {}) | {"weights": {name: float(n) for name, n in steps.items()}},
        "batch": raw["batch"]
        | {"size": {name: one["batch"]["size"] for name, one in alone.items()}},
        "modality": {name: one["modality"][name] for name, one in alone.items()},
    }
