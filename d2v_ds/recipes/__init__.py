"""The named runs: each a function that returns a complete configuration as plain settings.

Plain mappings, so that listing or loading a recipe imports no torch; `d2v-ds show NAME` prints one
with everything derived. Sources of the numbers are cited beside them: "fairseq" is
facebookresearch/fairseq at 3d262bb, examples/data2vec/config.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from d2v_ds.config import Config
from d2v_ds.decoding import apply_overrides, decode, load_yaml
from d2v_ds.errors import UserError, suggestion
from d2v_ds.recipes import speech

RECIPES: dict[str, Callable[[], dict[str, Any]]] = {
    "speech_tiny": speech.speech_tiny,
    "speech_base": speech.speech_base,
    "speech_large": speech.speech_large,
}


def load(source: str, overrides: list[str]) -> Config:
    """The configuration of a recipe's name or a YAML file, with `key=value` overrides applied.
    Raises UserError."""
    if source in RECIPES:
        raw = RECIPES[source]()
        raw.setdefault("run", {}).setdefault("name", source)
    elif source.endswith((".yaml", ".yml")) or "/" in source:
        from pathlib import Path

        raw = load_yaml(Path(source))
    else:
        raise UserError(
            f"{source!r}: no such recipe{suggestion(source, RECIPES)}; a file ends with .yaml"
        )
    return decode(Config, apply_overrides(raw, overrides))


def summary(name: str) -> str:
    """The first line of a recipe's docstring."""
    return (RECIPES[name].__doc__ or "").strip().splitlines()[0]
