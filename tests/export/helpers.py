"""Small models as weights, and the folders that they are exported to."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from d2v_ds import recipes
from d2v_ds.config.decoding import to_dict
from d2v_ds.config.finetuning import FineTuning
from d2v_ds.encoder import EncoderOutput, pretrained
from d2v_ds.export.writer import Content, Options, export
from d2v_ds.finetune.heads import HEADS, HeadKind
from d2v_ds.pretrain import Pretrain
from d2v_ds.weights import Weights, Which
from d2v_ds.weights.model import Part
from tests.helpers import joint_sets, variants

INPUTS = {"speech": "input_values", "vision": "pixel_values", "text": "input_ids"}
LABELS = {
    "speech": ("ctc", ["<blank>", "|", "a", "b", "'"]),
    "vision": ("classification", ["cat", "dog", "tree"]),
    "text": ("classification", ["bad", "good"]),
}
TOKENIZER = "shards/samples/text/tokenizer.model"


def weights_of(variant: str, *overrides: str) -> Weights:
    """Weights without any value of 0 or 1; the teacher's differ from the student's."""
    return from_task(variants.config(variant, *overrides))


def joint_weights() -> Weights:
    return from_task(recipes.load("joint_tiny", [*joint_sets.SMALL, "model.layer_drop=0"]))


def from_task(raw: Any) -> Weights:
    config = Pretrain.resolve(raw)
    torch.manual_seed(0)
    task = Pretrain.create(config).eval()
    with torch.no_grad():
        for parameter in (*task.student.parameters(), *task.teacher.parameters()):
            parameter.add_(0.1 * torch.randn_like(parameter))
        for module in task.modules():
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                module.weight[module.padding_idx].zero_()

    def tensors(part: Part) -> Mapping[str, Tensor]:
        if part == "head":
            return {}
        module = task.student if part == "student" else task.teacher
        return {name: p.detach() for name, p in module.named_parameters()}

    return Weights(
        path=Path("runs/example"),
        model=config.model,
        modality=config.modality,
        tensors=tensors,
        step=7,
        about={"recipe": config.run.name},
        config=config,
    )


KINDS: dict[str, HeadKind] = {"speech": "ctc", "vision": "mean", "text": "first"}


def with_head(
    found: Weights, task: str = "", kind: HeadKind | None = None, labels: Sequence[str] = ()
) -> Weights:
    """The weights, fine-tuned: with a random head."""
    [name] = found.modality
    usual, few = LABELS[name]
    task = task or usual
    labels = labels or (["value"] if task == "regression" else few)
    torch.manual_seed(1)
    module = HEADS[kind or KINDS[name]](found.model["dim"], len(labels), std=0.5, dropout=0.0)
    head = {f"head.{key}": torch.randn_like(p) for key, p in module.named_parameters()}
    settings = to_dict(FineTuning(task=cast(Any, task), labels=tuple(labels)))
    return dataclasses.replace(
        found,
        finetune=settings,
        tensors=lambda part: head if part == "head" else found.tensors(part),
    )


def write(found: Weights, out: Path, **options: Any) -> Content:
    """Exports without the verification, which takes seconds."""
    content, measured = export(
        found, out, Options(**{"verify": False, "needs_tokenizer": False, **options})
    )
    assert measured is None
    return content


def load(folder: Path, kind: str = "AutoModel", **options: Any) -> nn.Module:
    """The model in a folder, loaded by transformers; all tensors must match."""
    import transformers

    loader = getattr(transformers, kind)
    model, info = loader.from_pretrained(folder, output_loading_info=True, **options)
    assert not info["missing_keys"] and not info["mismatched_keys"], info
    assert not info["unexpected_keys"], info
    return model.eval()  # type: ignore[no-any-return]


@torch.no_grad()
def ours(
    found: Weights, which: Which, modality: str, examples: list[Any]
) -> tuple[EncoderOutput, Tensor]:
    """(features of all blocks, the trunk's output [B, T, D])."""
    encoder = pretrained(found, which, modality)
    batch = encoder.modality.unmasked(examples)
    last, _, _ = encoder.encoder.whole(batch, encoder.encoder.features(batch))
    return encoder(examples), last


def relative(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())
