"""The configuration of a run.

    recipe or YAML file + key.path=value --decoding.py--> Config (sections.py), validated

    sections.py     the settings, documented
    validation.py   checks across settings
    decoding.py     mappings <-> typed dataclasses, overrides, YAML
    compat.py       the settings that compat=fairseq changes
    resume.py       the settings that may change when a run resumes
    engine_file.py  the DeepSpeed settings behind engine.config
    reference.py    the settings as a reference, for `d2v-ds settings` and docs/configuration.md

Imports no torch.
"""

from d2v_ds.config.sections import (
    BatchSize,
    Config,
    Data,
    EngineSettings,
    Log,
    Optim,
    Run,
    Save,
    Target,
    Teacher,
)
from d2v_ds.config.validation import modality_of

__all__ = [
    "BatchSize",
    "Config",
    "Data",
    "EngineSettings",
    "Log",
    "Optim",
    "Run",
    "Save",
    "Target",
    "Teacher",
    "modality_of",
]
