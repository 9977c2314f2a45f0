"""The configuration of a run.

    recipe or YAML file + key.path=value --decoding.py--> Config, validated

    sections.py     the settings, documented
    config.py       Config, and checks of values and across settings
    decoding.py     mappings <-> typed dataclasses, overrides, YAML
    compat.py       the settings that compat=fairseq changes
    resume.py       the settings that may change when a run resumes
    engine_file.py  the DeepSpeed settings behind engine.config
    reference.py    the settings as a reference, for `d2v-ds settings` and docs/configuration.md

Imports no torch.
"""

from d2v_ds.config.config import Config, modality_of
from d2v_ds.config.sections import (
    BatchSize,
    Data,
    EngineSettings,
    Log,
    Optim,
    Run,
    Save,
    Target,
    TeacherSettings,
)

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
    "TeacherSettings",
    "modality_of",
]
