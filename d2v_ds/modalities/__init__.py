"""The registry of modalities: one line each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from d2v_ds.config.decoding import decode
from d2v_ds.errors import UserError, suggestion
from d2v_ds.modalities.base import Modality
from d2v_ds.modalities.speech import Speech
from d2v_ds.modalities.text import Text
from d2v_ds.modalities.vision import Vision

REGISTRY: dict[str, type[Modality]] = {
    "speech": Speech,
    "vision": Vision,
    "text": Text,
}


def create_modalities(settings: Mapping[str, Mapping[str, Any]]) -> dict[str, Modality]:
    """The modalities that `modality.*` of a configuration names. Raises UserError."""
    modalities = {}
    for name, raw in settings.items():
        if name not in REGISTRY:
            raise UserError(f"modality.{name}: no such modality{suggestion(name, REGISTRY)}")
        kind = REGISTRY[name]
        modalities[name] = kind(decode(kind.Config, raw, f"modality.{name}"))
    if not modalities:
        raise UserError(f"modality: name at least one of {', '.join(sorted(REGISTRY))}")
    return modalities
