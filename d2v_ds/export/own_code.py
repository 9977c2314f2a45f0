"""Self-contained folders with the Python files of remote/: for data2vec 2.0, joint models, and
settings that the classes of transformers cannot express."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from d2v_ds.export.heads import CLASSES, classes_of, head_kind
from d2v_ds.export.model import Exported

CODE = Path(__file__).parent / "remote"
MODEL_FILES = ["configuration_d2v.py", "layers_d2v.py", "modeling_d2v.py"]


def own_config(exported: Exported) -> dict[str, Any]:
    """config.json for the classes of modeling_d2v.py."""
    heads = dict(pair for (name, _), pair in CLASSES.items() if name in exported.modality)
    classes = {"AutoModel": "D2vModel", **heads}
    architecture = "D2vModel"
    if exported.head:
        architecture = classes_of(exported.names[0], exported.head)[1]
    config: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": "d2v_ds",
        "auto_map": {
            "AutoConfig": "configuration_d2v.D2vConfig",
            **{auto: f"modeling_d2v.{name}" for auto, name in classes.items()},
        },
    }
    if exported.head and head_kind(exported.head) != "ctc":
        config["pool"] = head_kind(exported.head)
    if exported.finetune.get("task") == "ctc":
        config["vocab_size"] = len(exported.finetune["labels"])
    elif "text" in exported.modality:
        config["vocab_size"] = exported.modality["text"]["vocab_size"]
        config["pad_token_id"] = exported.modality["text"]["pad_id"]
        for name in ("bos", "eos"):
            config[f"{name}_token_id"] = exported.special_ids.get(name)
    return config


def own_tensors(exported: Exported) -> dict[str, Tensor]:
    """encoder.* and head.*."""
    return {**exported.encoder, **exported.head}


def source_of(name: str) -> str:
    """The content of a file of remote/."""
    return (CODE / name).read_text()
