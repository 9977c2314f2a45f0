"""Exported models give the outputs of our encoder in transformers, for all variants, student and
teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from d2v_ds.data import images
from d2v_ds.export.heads import build_head
from d2v_ds.modalities import create_modalities
from d2v_ds.weights import Weights, Which
from tests.export.helpers import (
    INPUTS,
    from_task,
    joint_weights,
    load,
    ours,
    relative,
    weights_of,
    with_head,
    write,
)
from tests.helpers import variants
from tests.helpers.variants import VARIANTS

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

WEIGHTS: tuple[Which, ...] = ("student", "teacher")
KINDS = {
    "speech": "AutoModelForCTC",
    "vision": "AutoModelForImageClassification",
    "text": "AutoModelForSequenceClassification",
}


def examples(found: Weights, name: str, *sizes: int) -> list[Any]:
    """sizes: approximate tokens, ignored for images."""
    rng = np.random.default_rng(1)
    settings = found.modality[name]
    if name == "speech":
        return [rng.standard_normal(320 * n + 80).astype(np.float32) for n in sizes]
    if name == "text":
        return [rng.integers(4, settings["vocab_size"] - 1, n) for n in sizes]
    shape = (3, settings["image_size"], settings["image_size"])
    return [rng.integers(0, 256, shape, dtype=np.uint8) for _ in sizes]


def batch_of(found: Weights, name: str, samples: list[Any], masked: bool) -> dict[str, Tensor]:
    """The arguments of a model of transformers; masked: with an attention mask."""
    batch = create_modalities(found.modality)[name].unmasked(samples)
    inputs = images.normalise(batch.inputs) if name == "vision" else batch.inputs
    arguments = {INPUTS[name]: inputs}
    if masked and name != "vision":
        lengths = torch.tensor([len(sample) for sample in samples])
        arguments["attention_mask"] = (torch.arange(inputs.shape[1]) < lengths[:, None]).long()
    return arguments


def options_of(variant: str) -> dict[str, Any]:
    if variant.startswith("v2"):
        return {"trust_remote_code": True}
    return {"add_pooling_layer": False} if variant == "v1_text" else {}


@pytest.mark.parametrize("which", WEIGHTS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_features_are_equal(variant: str, which: Which, tmp_path: Path) -> None:
    found, name = weights_of(variant), variant[3:]
    content = write(found, tmp_path / "out", weights=which)
    assert bool(content.problems) == variant.startswith("v2")
    model = load(tmp_path / "out", **options_of(variant))
    assert ("transformers_modules" in type(model).__module__) == variant.startswith("v2")
    compare(model, found, which, name, examples(found, name, 40, 40))


def compare(model: Any, found: Weights, which: Which, name: str, samples: list[Any]) -> None:
    """All blocks and the trunk's output, in one batch."""
    expected, last = ours(found, which, name, samples)
    unequal = len({np.size(sample) for sample in samples}) > 1
    with torch.no_grad():
        batch = batch_of(found, name, samples, masked=unequal)
        output = model(**batch, output_hidden_states=True)
    E = found.modality[name]["extra_tokens"]
    valid = torch.ones(last.shape[:2], dtype=torch.bool)
    if expected.valid is not None:
        valid = expected.valid
    assert len(output.hidden_states) == len(expected.blocks) + 1
    assert relative(output.last_hidden_state[:, E:][valid], last[valid]) <= 1e-5
    for state, block in zip(output.hidden_states[1:], expected.blocks, strict=True):
        assert relative(state[:, E:][valid], block[valid]) <= 1e-5


@pytest.mark.parametrize("variant", ["v2_speech", "v2_text", "v1_text"])
def test_padding_does_not_influence_the_result(variant: str, tmp_path: Path) -> None:
    found, name = weights_of(variant), variant[3:]
    write(found, tmp_path / "out")
    model: Any = load(tmp_path / "out", **options_of(variant))
    samples = examples(found, name, 40, 11, 25)
    compare(model, found, "student", name, samples)
    batch = batch_of(found, name, samples, masked=True)
    with torch.no_grad():
        together = model(**batch).last_hidden_state
        for row, sample in zip(together, samples, strict=True):
            [alone] = model(**batch_of(found, name, [sample], masked=False)).last_hidden_state
            assert relative(row[: len(alone)], alone) <= 1e-5
        if name == "text":  # without a mask, the padding id is enough
            again = model(input_ids=batch["input_ids"])
            if variant == "v2_text":
                valid = batch["attention_mask"].bool()
                assert torch.equal(again.last_hidden_state[valid], together[valid])
                assert torch.equal(again.token_mask, valid)


@pytest.mark.parametrize("which", WEIGHTS)
def test_a_joint_model(which: Which, tmp_path: Path) -> None:
    found = joint_weights()
    write(found, tmp_path / "all", weights=which)
    model = load(tmp_path / "all", trust_remote_code=True)
    for name in found.modality:
        compare(model, found, which, name, examples(found, name, 40, 15, 22))
    write(found, tmp_path / "one", weights=which, modality="vision")
    one: Any = load(tmp_path / "one", trust_remote_code=True)
    compare(one, found, which, "vision", examples(found, "vision", 1, 1))
    with pytest.raises(ValueError, match=r"no front end for text \(it has: vision\)"):
        one(input_ids=torch.ones(1, 3, dtype=torch.long))


@pytest.mark.parametrize("setting", ["vision.extra_tokens=2", "speech.extra_tokens=1"])
def test_settings_that_transformers_lacks(setting: str, tmp_path: Path) -> None:
    """A prenet, extra tokens, LayerScale and pre-norm blocks in our own code."""
    name = setting.partition(".")[0]
    more = ["model.norm=pre", "model.qkv_bias=qv", "model.layer_scale=0.1"]
    raw = variants.config(
        f"v2_{name}", f"modality.{setting}", f"modality.{name}.prenet_depth=2", *more
    )
    found = from_task(raw)
    content = write(found, tmp_path / "out")
    assert f"modality.{name}.prenet_depth=2" in content.problems
    model = load(tmp_path / "out", trust_remote_code=True)
    compare(model, found, "student", name, examples(found, name, 30, 12))


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_equal(variant: str, tmp_path: Path) -> None:
    name = variant[3:]
    found = with_head(weights_of(variant))
    write(found, tmp_path / "out")
    options = {"trust_remote_code": True} if variant.startswith("v2") else {}
    check_logits(load(tmp_path / "out", KINDS[name], **options), found, name)


def check_logits(model: Any, found: Weights, name: str, unequal: bool = False) -> None:
    samples = examples(found, name, 30, 17 if unequal else 30)
    features, _ = ours(found, "student", name, samples)
    with torch.no_grad():
        output = model(**batch_of(found, name, samples, masked=unequal))
        expected = build_head(found.tensors("head"))(features.blocks[-1], features.valid)
    assert relative(output.logits, expected) <= 1e-5
    if found.finetune["task"] == "classification":
        labels = found.finetune["labels"]
        assert [model.config.id2label[i] for i in range(len(labels))] == labels


OTHER_HEADS = {
    "v1_text": ("mean", "AutoModelForSequenceClassification"),
    "v2_text": ("mean", "AutoModelForSequenceClassification"),
    "v1_vision": ("first", "AutoModelForImageClassification"),
    "v1_speech": ("mean", "AutoModelForAudioClassification"),
    "v2_speech": ("first", "AutoModelForAudioClassification"),
}


@pytest.mark.parametrize("variant", OTHER_HEADS)
def test_heads_that_stock_classes_lack(variant: str, tmp_path: Path) -> None:
    kind, auto = OTHER_HEADS[variant]
    found = with_head(weights_of(variant), "classification", kind)
    content = write(found, tmp_path / "out")
    assert f"a head of the kind {kind} for {variant[3:]}" in content.problems or variant[1] == "2"
    model = load(tmp_path / "out", auto, trust_remote_code=True)
    check_logits(model, found, variant[3:], unequal="vision" not in variant)


@pytest.mark.parametrize("variant", ["v1_text", "v2_text"])
def test_regression(variant: str, tmp_path: Path) -> None:
    found = with_head(weights_of(variant), "regression")
    write(found, tmp_path / "out")
    options = {"trust_remote_code": True} if variant.startswith("v2") else {}
    model: Any = load(tmp_path / "out", KINDS["text"], **options)
    check_logits(model, found, "text")
    batch = batch_of(found, "text", examples(found, "text", 12, 12), masked=False)
    output = model(**batch, labels=torch.tensor([0.5, -2.0]))
    error = (output.logits[:, 0] - torch.tensor([0.5, -2.0])).square().mean()
    assert torch.allclose(output.loss, error)


@pytest.mark.parametrize("name", KINDS)
def test_a_pre_trained_export_can_be_fine_tuned(name: str, tmp_path: Path) -> None:
    """The loss of a new head falls, and the saved model gives the same outputs again."""
    import transformers

    found = weights_of(f"v2_{name}", "model.dropout=0", "model.attention_dropout=0")
    write(found, tmp_path / "out")
    kind = getattr(transformers, KINDS[name])
    size = {"vocab_size": 6} if name == "speech" else {"num_labels": 3}
    torch.manual_seed(0)
    model = kind.from_pretrained(tmp_path / "out", trust_remote_code=True, **size).train()
    batch = batch_of(found, name, examples(found, name, 40, 30), masked=True)
    labels = torch.tensor([[1, 2, 3], [4, 1, -100]]) if name == "speech" else torch.tensor([2, 0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = []
    for _ in range(8):
        loss = model(**batch, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.eval().save_pretrained(tmp_path / "tuned")
    again = kind.from_pretrained(tmp_path / "tuned", trust_remote_code=True).eval()
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, model(**batch).logits)


def test_wrong_inputs_are_errors(tmp_path: Path) -> None:
    write(joint_weights(), tmp_path / "out")
    model: Any = load(tmp_path / "out", trust_remote_code=True)
    with pytest.raises(ValueError, match="give one of input_values, pixel_values, input_ids"):
        model()
    with pytest.raises(ValueError, match=r"pixel_values: expected \[B, 3, 16, 16\]"):
        model(pixel_values=torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match="at most 40 tokens, got 41"):
        model(input_ids=torch.full((1, 41), 5))
