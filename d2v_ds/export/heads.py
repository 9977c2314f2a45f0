"""The head of a fine-tuned model: which kind it is, and the classes of transformers for it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from d2v_ds.finetune.heads import HEADS, STD, HeadKind

# (modality, kind) -> (class of transformers for any model, class of remote/modeling_d2v.py)
CLASSES: dict[tuple[str, str], tuple[str, str]] = {
    ("speech", "ctc"): ("AutoModelForCTC", "D2vForCTC"),
    ("speech", "pooled"): ("AutoModelForAudioClassification", "D2vForAudioClassification"),
    ("vision", "pooled"): ("AutoModelForImageClassification", "D2vForImageClassification"),
    ("text", "pooled"): ("AutoModelForSequenceClassification", "D2vForSequenceClassification"),
}


def head_kind(head: Mapping[str, Tensor]) -> HeadKind:
    """The kind of a head, from the names of its tensors, head.*."""
    if "head.dense.weight" in head:
        return "first"
    return "mean" if "head.norm.weight" in head else "ctc"


def classes_of(modality: str, head: Mapping[str, Tensor]) -> tuple[str, str]:
    """The classes for a model with this head."""
    return CLASSES[modality, "ctc" if head_kind(head) == "ctc" else "pooled"]


def build_head(head: Mapping[str, Tensor]) -> nn.Module:
    """The head with its weights, in evaluation mode."""
    outputs, dim = head["head.proj.weight"].shape
    module = HEADS[head_kind(head)](dim, outputs, std=STD, dropout=0.0)
    module.load_state_dict({name.removeprefix("head."): value for name, value in head.items()})
    return module.eval()
