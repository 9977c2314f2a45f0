"""The recipes: functions that return a complete configuration as plain mappings.

Listing or loading a recipe imports no torch. `d2v-ds show NAME` prints the resolved configuration.
Comments cite the source of the numbers: "fairseq" is facebookresearch/fairseq at 3d262bb,
examples/data2vec/config; "data2vec_vision" is facebookresearch/data2vec_vision at af9a363; "the
paper" is cited for numbers that no file contains.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from d2v_ds.config import Config, modality_of
from d2v_ds.config.compat import apply_compat
from d2v_ds.config.decoding import apply_overrides, decode, value_at
from d2v_ds.config.documents import load_yaml
from d2v_ds.errors import UserError, suggestion
from d2v_ds.recipes import (
    finetuning,
    finetuning_speech,
    finetuning_text,
    finetuning_vision,
    joint,
    speech,
    text,
    vision,
)

PRETRAINING = [
    speech.speech_tiny,
    speech.speech_base,
    speech.speech_large,
    speech.speech_tiny_v1,
    speech.speech_base_v1,
    vision.vision_tiny,
    vision.vision_base,
    vision.vision_large,
    vision.vision_huge,
    vision.vision_huge16,
    vision.vision_tiny_v1,
    vision.vision_base_v1,
    vision.vision_large_v1,
    vision.vision_large_v1_second,
    text.text_tiny,
    text.text_base,
    text.text_large,
    text.text_tiny_v1,
    text.text_base_v1,
    joint.joint_tiny,
    joint.joint_base,
]
FINETUNING = [
    finetuning.finetune_speech_tiny,
    finetuning.finetune_vision_tiny,
    finetuning.finetune_text_tiny,
    *finetuning_speech.FUNCTIONS,
    *finetuning_vision.FUNCTIONS,
    *finetuning_text.FUNCTIONS,
]
# {title: {name: recipe}}, as `d2v-ds recipes` prints them
GROUPS: dict[str, dict[str, Callable[[], dict[str, Any]]]] = {
    "pre-training": {f.__name__: f for f in PRETRAINING},
    "fine-tuning": {f.__name__: f for f in FINETUNING},
}
RECIPES = {name: f for group in GROUPS.values() for name, f in group.items()}


def load(source: str, overrides: list[str]) -> Config:
    """The configuration of a recipe or a YAML file with `key.path=value` overrides applied. Raises
    UserError."""
    if source in RECIPES:
        raw = RECIPES[source]()
        raw.setdefault("run", {}).setdefault("name", source)
    elif source.endswith((".yaml", ".yml")) or "/" in source:
        from pathlib import Path

        raw = load_yaml(Path(source))
    else:
        raise UserError(
            f"{source!r}: no such recipe{suggestion(source, RECIPES)}. Names of configuration "
            "files end with .yaml or .yml."
        )
    # compat=fairseq as an override replaces settings of the recipe or file. Other overrides take
    # precedence over it.
    asked = [o for o in overrides if o.partition("=")[0] == "compat"]
    apply_compat(apply_overrides(raw, asked), over=bool(asked))
    return decode(Config, without_dropped(apply_overrides(raw, overrides)))


def without_dropped(raw: dict[str, Any]) -> dict[str, Any]:
    """The settings without modalities that are null. modality.text=null removes text from a joint
    recipe."""
    modalities = raw.get("modality")
    if not isinstance(modalities, dict):
        return raw  # decoding reports the error
    dropped = [name for name, settings in modalities.items() if settings is None]
    sections = (modalities, *(value_at(raw, path) for path in BY_MODALITY))
    for section in sections:
        for name in list(section) if isinstance(section, dict) else ():
            if modality_of(name) in dropped:
                del section[name]
    return raw


# Settings whose keys are modalities or sources.
BY_MODALITY = ("data.shards", "data.weights", "batch.size")


def summary(name: str) -> str:
    """The first line of a recipe's docstring."""
    return (RECIPES[name].__doc__ or "").strip().splitlines()[0]
