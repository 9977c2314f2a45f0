"""Self-contained folders with the Python files of remote/: for data2vec 2.0, joint models, and
settings that the classes of transformers cannot express."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from d2v_ds.export.model import Exported

CODE = Path(__file__).parent / "remote"
MODEL_FILES = ["configuration_d2v.py", "layers_d2v.py", "modeling_d2v.py"]
HEADS = {  # modality -> (class of transformers, class of modeling_d2v.py)
    "speech": ("AutoModelForCTC", "D2vForCTC"),
    "vision": ("AutoModelForImageClassification", "D2vForImageClassification"),
    "text": ("AutoModelForSequenceClassification", "D2vForSequenceClassification"),
}


def own_config(exported: Exported) -> dict[str, Any]:
    """config.json for the classes of modeling_d2v.py."""
    heads = {HEADS[name][0]: HEADS[name][1] for name in exported.names}
    classes = {"AutoModel": "D2vModel", **heads}
    architecture = HEADS[exported.names[0]][1] if exported.finetune else "D2vModel"
    config: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": "d2v_ds",
        "auto_map": {
            "AutoConfig": "configuration_d2v.D2vConfig",
            **{auto: f"modeling_d2v.{name}" for auto, name in classes.items()},
        },
    }
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
