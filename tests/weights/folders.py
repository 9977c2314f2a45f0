"""Folders of transformers, of tiny models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from d2v_ds.key_maps import HUGGING_FACE, to_theirs
from d2v_ds.pretrain import Pretrain
from tests.helpers import variants
from tests.test_key_maps import MODELS, shaken


def filled(model: nn.Module) -> nn.Module:
    """A model without any weight of 0 or 1."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
            if name.endswith("position_embeddings.weight") or "word_embeddings" in name:
                parameter[1].zero_()
    return model.eval()


def base(modality: str) -> tuple[Pretrain, Any]:
    """Our task, and the class of transformers with its weights."""
    task = shaken(f"v1_{modality}").eval()
    model = MODELS[modality](task).eval()
    theirs = to_theirs(task.student.state_dict(), HUGGING_FACE[modality, "1.0"])
    model.load_state_dict(theirs)
    return task, model


def with_head(modality: str, **settings: Any) -> Any:
    import transformers

    _, model = base(modality)
    name = {"speech": "AudioForCTC", "vision": "VisionForImageClassification"}.get(
        modality, "TextForSequenceClassification"
    )
    model.config.update({"use_mean_pooling": True} if modality == "vision" else {})
    model.config.update(settings)
    return filled(getattr(transformers, f"Data2Vec{name}")(model.config))


def inputs(task: Any, modality: str) -> Any:
    return task.modalities[modality].unmasked(variants.examples(task, 40, 40)).inputs


def close(found: Tensor, expected: Tensor) -> None:
    difference = (found - expected).abs().max() / expected.abs().max()
    assert difference < 1e-5, f"outputs differ by {difference:.1e}"


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_state(folder: Path, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")
