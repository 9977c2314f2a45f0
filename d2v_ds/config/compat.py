"""compat=fairseq: the settings that reproduce the original code (docs/differences.md)."""

from __future__ import annotations

from typing import Any

# As the original code runs, where the default here is corrected.
FAIRSEQ: dict[str, Any] = {
    "optim.decay_all": True,
    "optim.adam_eps": "fairseq",
    "modality.speech.padded_statistics": True,
    "modality.text.padded_statistics": True,
    "modality.vision.cls_views": None,
    "modality.text.text_teacher": "masked",
}


def apply_compat(raw: dict[str, Any], *, over: bool) -> None:
    """Writes what raw["compat"] stands for into the settings `raw`, for the modalities that it
    has; over: in place of what they say, else where they say nothing."""
    if raw.get("compat") != "fairseq":
        return
    for path, value in FAIRSEQ.items():
        *sections, key = path.split(".")
        if sections[0] == "modality" and sections[1] not in raw.get("modality", {}):
            continue
        if path.endswith("text_teacher") and masked_of(raw, "text") != "replaced":
            continue  # it is 1.0's
        section = raw
        for name in sections:
            section = section.setdefault(name, {})
        if over or key not in section:
            section[key] = value


def masked_of(raw: dict[str, Any], modality: str) -> str:
    return str(raw["modality"][modality].get("masked", "removed"))
