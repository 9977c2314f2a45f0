"""compat=fairseq: the settings that reproduce the original code (docs/differences.md)."""

from __future__ import annotations

from typing import Any

from d2v_ds.config.decoding import value_at

# The settings with which the original code runs. This project corrects their defaults.
FAIRSEQ: dict[str, Any] = {
    "optim.decay_all": True,
    "optim.adam_eps": "fairseq",
    "modality.speech.padded_statistics": True,
    "modality.text.padded_statistics": True,
    "modality.vision.cls_views": None,
    "modality.text.text_teacher": "masked",
}


def apply_compat(raw: dict[str, Any], *, over: bool) -> None:
    """If raw["compat"] is fairseq, writes FAIRSEQ into the settings `raw`, limited to the
    modalities that they have. over: replace given settings; otherwise only fill in missing ones."""
    if raw.get("compat") != "fairseq":
        return
    for path, value in FAIRSEQ.items():
        *sections, key = path.split(".")
        if sections[0] == "modality" and not isinstance(value_at(raw, ".".join(sections)), dict):
            continue
        if path.endswith("text_teacher") and masked_of(raw, "text") != "replaced":
            continue  # a setting of data2vec 1.0
        section = raw
        for name in sections:
            section = section.setdefault(name, {}) if isinstance(section, dict) else section
        if isinstance(section, dict) and (over or key not in section):  # else decoding refuses it
            section[key] = value


def masked_of(raw: dict[str, Any], modality: str) -> str:
    """The setting `masked` of a modality: removed or replaced."""
    return str(raw["modality"][modality].get("masked", "removed"))
