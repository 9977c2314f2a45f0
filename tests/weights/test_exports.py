"""Folders in the format of our exports, as they are and as transformers saves them again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from d2v_ds.encoder import encoder_of, load_encoder
from d2v_ds.errors import UserError
from d2v_ds.finetune.model import load_finetuned
from d2v_ds.key_maps import HUGGING_FACE, to_theirs
from d2v_ds.pretrain import Pretrain
from d2v_ds.weights import open_weights
from tests.helpers import variants
from tests.helpers.variants import VARIANTS
from tests.test_key_maps import shaken
from tests.weights.folders import base, close, edit_config, edit_state, filled, inputs

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def exported(task: Pretrain, folder: Path, which: str = "student", finetune: Any = None) -> None:
    """A folder as d2v-ds export writes it, for any variant."""
    [name] = task.modalities
    version = "1.0" if task.modalities[name].config.masked == "replaced" else "2.0"
    config = Pretrain.resolve(variants.config(f"v{version[0]}_{name}"))
    tensors = {f"encoder.{n}": p.detach() for n, p in task.student.encoder.named_parameters()}
    if which == "teacher":
        averages = task.teacher.encoder.named_parameters()
        tensors |= {f"encoder.{n}": p.detach() for n, p in averages}
    kind = "d2v_ds"
    if version == "1.0":
        kind = {"speech": "data2vec-audio"}.get(name, f"data2vec-{name}")
        theirs = to_theirs(tensors, HUGGING_FACE[name, "1.0"])
        tensors = {n: t.contiguous() for n, t in theirs.items()}
    entry = {
        "version": 1,
        "weights": which,
        "step": 7,
        "model": config.model,
        "modality": config.modality,
        "finetune": finetune or {},
        "about": {"recipe": "tiny"},
    }
    (folder / "config.json").write_text(json.dumps({"model_type": kind, "d2v_ds": entry}))
    save_file(tensors, folder / "model.safetensors")
    rest = {n: p.detach() for n, p in task.student.named_parameters() if n[:10] == "predictors"}
    save_file(rest, folder / "predictors.safetensors")
    (folder / "tokenizer.model").write_bytes(b"x")


@pytest.mark.parametrize("which", ["student", "teacher"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_our_exports_are_exact(variant: str, which: Any, tmp_path: Path) -> None:
    task = shaken(variant).eval()
    with torch.no_grad():
        for parameter in task.teacher.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    exported(task, tmp_path, which)
    found = open_weights(tmp_path)
    config = Pretrain.resolve(variants.config(variant))
    assert found.model == config.model and found.modality == config.modality
    assert found.step == 7 and found.about == {"recipe": "tiny"}
    assert found.files == {"tokenizer.model": tmp_path / "tokenizer.model"}
    predictors = {n: p for n, p in task.student.named_parameters() if n.startswith("predictors")}
    student = found.tensors("student")
    assert predictors and all(torch.equal(student[n], p) for n, p in predictors.items())
    examples = variants.examples(task, 30, 40)
    with torch.no_grad():
        expected = encoder_of(task, variant[3:], which)(examples).blocks
        for weights in {"student", which}:
            ours = load_encoder(tmp_path, weights=weights)(examples).blocks
            assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    if which == "student":
        with pytest.raises(UserError, match="has no teacher's weights"):
            load_encoder(tmp_path, weights="teacher")


def test_the_head_of_our_exports(tmp_path: Path) -> None:
    task = shaken("v2_speech")
    exported(task, tmp_path, finetune={"task": "ctc", "labels": ["<blank>", "a"]})
    tensors = load_file(tmp_path / "model.safetensors")
    head = {"head.proj.weight": torch.ones(2, 32), "head.proj.bias": torch.zeros(2)}
    save_file(tensors | head, tmp_path / "model.safetensors")
    found = open_weights(tmp_path)
    assert found.finetune == {"task": "ctc", "labels": ["<blank>", "a"]}
    assert found.tensors("head").keys() == head.keys()


RELABELLED = {
    "vision": ("v2_vision", "classification", ["cat", "dog"], ["a", "b"]),
    "speech": ("v2_speech", "ctc", ["<blank>", "a"], ["<blank>", "b"]),
}


@pytest.mark.parametrize("kind", RELABELLED)
def test_an_export_that_was_trained_for_other_labels(kind: str, tmp_path: Path) -> None:
    """The labels are saved beside the entry of d2v_ds, which stays as it was."""
    variant, task, before, after = RELABELLED[kind]
    exported(shaken(variant), tmp_path, finetune={"task": task, "labels": before, "tokenizer": ""})
    head = {"head.proj.weight": torch.ones(2, 32), "head.proj.bias": torch.zeros(2)}
    if kind == "vision":
        head |= {"head.norm.weight": torch.ones(32), "head.norm.bias": torch.zeros(32)}
    edit_state(tmp_path, lambda t: t.update(head))

    def save(labels: list[str]) -> None:
        edit_config(tmp_path, id2label=dict(enumerate(labels)), pad_token_id=0)
        vocabulary = {label: i for i, label in enumerate(labels)}
        if kind == "speech":
            (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))

    save(before)
    found = open_weights(tmp_path)
    assert found.finetune["labels"] == before and "assumed" not in found.about
    save(after)
    found = open_weights(tmp_path)
    assert found.finetune["labels"] == after
    [sentence] = found.about["assumed"]
    assert "differ from the export's" in sentence


def saved_again(tmp_path: Path, kind: str, **settings: Any) -> Any:
    """A model of transformers that was made of our export, trained and saved without our files."""
    import transformers

    model = getattr(transformers, kind).from_pretrained(tmp_path / "out", **settings)
    filled(model).save_pretrained(tmp_path / "again")
    return model


def test_an_export_that_transformers_trained_and_saved(tmp_path: Path) -> None:
    """It has a trained embedding of the token type, and a head that the export did not have."""
    (tmp_path / "out").mkdir()
    task = shaken("v1_text").eval()
    exported(task, tmp_path / "out")
    edit_config(tmp_path / "out", **stock_settings("text"))
    model = saved_again(tmp_path, "AutoModelForSequenceClassification", num_labels=3)
    found = open_weights(tmp_path / "again")
    assert found.finetune == {
        "task": "classification",
        "labels": ["LABEL_0", "LABEL_1", "LABEL_2"],
        "bos_id": None,
    }
    ids = inputs(task, "text")
    with torch.no_grad():
        expected = model(input_ids=ids, output_hidden_states=True)
        close(load_encoder(tmp_path / "again")(list(ids.numpy())).blocks[-1], expected[1][-1])
        close(load_finetuned(tmp_path / "again")(list(ids.numpy())).values, expected[0])


def test_an_export_without_the_norm_of_the_trunk(tmp_path: Path) -> None:
    """Data2VecVisionForImageClassification has none; transformers ignores the file with ours."""
    (tmp_path / "out").mkdir()
    task = shaken("v1_vision").eval()
    exported(task, tmp_path / "out")
    edit_config(tmp_path / "out", **stock_settings("vision") | {"use_mean_pooling": True})
    model = saved_again(tmp_path, "AutoModelForImageClassification", num_labels=3)
    found = open_weights(tmp_path / "again")
    assert (
        "The norm after the last block changes nothing: the source has none."
        in (found.about["assumed"])
    )
    pixels = variants.examples(task, 40, 40)
    with torch.no_grad():
        expected = model(torch.from_numpy(np.stack(pixels))).logits
        close(load_finetuned(tmp_path / "again")(pixels).values, expected)


def stock_settings(modality: str) -> dict[str, Any]:
    """config.json of the class of transformers for the variant."""
    return dict(base(modality)[1].config.to_diff_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"about": {"data": [1]}}, r"d2v_ds\.about\.data=\[1\], expected an object"),
        ({"about": {"data": {"x": 1}}}, r"d2v_ds\.about\.data\.x=1, expected an object"),
        ({"version": 2}, "was exported in format 2, but this d2v_ds reads 1"),
        ({"version": "1"}, "was exported in format '1', but this d2v_ds reads 1"),
        ({"model": None}, "lacks model or modality"),
        ({"step": "five"}, r"d2v_ds\.step='five', expected an integer"),
        ({"about": [1]}, r"d2v_ds\.about=\[1\], expected an object"),
        ({"finetune": "x"}, r"d2v_ds\.finetune='x', expected an object"),
        ({"finetune": {"x": 1}}, r"d2v_ds\.finetune in config\.json has no task"),
        ({"model": {"dim": 12 * 10**11}}, r"model\.dim: must be at most 131072"),
    ],
)
def test_bad_exports(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    exported(shaken("v2_text"), tmp_path)
    entry = json.loads((tmp_path / "config.json").read_text())["d2v_ds"]
    edit_config(tmp_path, d2v_ds=entry | change)
    with pytest.raises(UserError, match=message):
        open_weights(tmp_path)


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    exported(shaken("v2_text"), tmp_path)
    name = "encoder.trunk.blocks.0.norm1.weight"
    edit_state(tmp_path, lambda tensors: tensors[name][:1].fill_(float("nan")))
    with pytest.raises(UserError, match=r"blocks\.0\.norm1\.weight has values that are NaN or inf"):
        load_encoder(tmp_path)
