"""The registry of modalities, one line each.

A modality is imported when it is first needed, so that commands that only list names start fast.
Code outside the package adds its own: REGISTRY["sensor"] = "my_package.sensor:Sensor".
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

from d2v_ds.config.decoding import decode
from d2v_ds.errors import UserError, suggestion

if TYPE_CHECKING:
    from d2v_ds.data.headers import SampleFormat
    from d2v_ds.modalities.base import Modality

REGISTRY: dict[str, str] = {
    "speech": "d2v_ds.modalities.speech:Speech",
    "vision": "d2v_ds.modalities.vision:Vision",
    "text": "d2v_ds.modalities.text:Text",
}


def modality_class(name: str) -> type[Modality]:
    """The class of a modality. Raises UserError for an unknown name."""
    if name not in REGISTRY:
        raise UserError(f"modality.{name}: no such modality{suggestion(name, REGISTRY)}")
    module, _, attribute = REGISTRY[name].partition(":")
    found: type[Modality] = getattr(import_module(module), attribute)
    return found


def create_modalities(settings: Mapping[str, Mapping[str, Any]]) -> dict[str, Modality]:
    """The modalities of a configuration, built from its `modality.*`. Raises UserError for an
    unknown modality or setting, or if there is none."""
    modalities = {}
    for name, raw in settings.items():
        kind = modality_class(name)
        modalities[name] = kind(decode(kind.Config, raw, f"modality.{name}"))
    if not modalities:
        raise UserError(f"modality: name at least one of {', '.join(sorted(REGISTRY))}")
    return modalities


def sample_formats(name: str = "") -> list[SampleFormat]:
    """The format of samples in tars of a modality, or of every registered modality if name is "".
    Raises UserError for an unknown name."""
    from d2v_ds.data.headers import SampleFormat

    kinds = [modality_class(each) for each in ([name] if name else REGISTRY)]
    return [
        SampleFormat(kind.name, kind.length_unit, kind.header_readers, kind.converter)
        for kind in kinds
    ]
