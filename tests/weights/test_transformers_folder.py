"""Folders of transformers, written by its own classes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from d2v_ds.encoder import encoder_of, load_encoder
from d2v_ds.errors import UserError
from d2v_ds.finetune.model import load_finetuned
from d2v_ds.pretrain import Pretrain
from d2v_ds.weights import build_encoder, open_weights
from tests.helpers import variants
from tests.test_key_maps import ARGUMENTS, MODELS
from tests.weights.folders import base, close, edit_config, edit_state, filled, inputs, with_head
from tests.weights.test_unpickle import Call

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

LABELS = ["<pad>", "|", "E", "T", "A"]


# -------------------------------------------------------------------------------- the encoder alone


@pytest.mark.parametrize("form", ["safetensors", "bin", "shards"])
@pytest.mark.parametrize("modality", MODELS)
def test_an_encoder_has_the_same_parameters_and_features(
    modality: str, form: str, tmp_path: Path
) -> None:
    task, model = base(modality)
    if form == "shards":
        model.save_pretrained(tmp_path, max_shard_size="100KB")
        assert (tmp_path / "model.safetensors.index.json").is_file()
    else:
        model.save_pretrained(tmp_path)
    if form == "bin":
        torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
        (tmp_path / "model.safetensors").unlink()
    found = open_weights(tmp_path)
    expected = {f"encoder.{name}": p for name, p in task.student.encoder.named_parameters()}
    student = found.tensors("student")
    assert student.keys() == expected.keys()
    assert all(torch.equal(student[name], value) for name, value in expected.items())
    assert found.tensors("teacher") == {} and found.tensors("head") == {}
    config = Pretrain.resolve(variants.config(f"v1_{modality}"))
    drops = {"dropout", "attention_dropout", "activation_dropout", "drop_path", "layer_drop"}
    assert {k: v for k, v in found.model.items() if k not in drops} == {
        k: v for k, v in config.model.items() if k not in drops
    }
    assert found.model["attention_dropout"] == model.config.to_dict().get(
        "attention_dropout", model.config.to_dict().get("attention_probs_dropout_prob")
    )
    examples = variants.examples(task, 30, 40)
    with torch.no_grad():
        ours = load_encoder(tmp_path)(examples)
        theirs = encoder_of(task, modality, "student")(examples)
    assert all(torch.equal(a, b) for a, b in zip(ours.blocks, theirs.blocks, strict=True))


def test_token_types_are_folded_into_the_positions(tmp_path: Path) -> None:
    from transformers import Data2VecTextModel

    task, stock = base("text")
    model = filled(Data2VecTextModel(stock.config))  # with a pooler, and a token type that is not 0
    model.save_pretrained(tmp_path)
    found = open_weights(tmp_path)
    assert found.about["left_out"] == ["pooler.dense.bias", "pooler.dense.weight"]
    assert "The embedding of token type 0 was added to the positions." in found.about["assumed"]
    ids = inputs(task, "text")
    with torch.no_grad():
        expected = model(input_ids=ids).last_hidden_state
        close(load_encoder(tmp_path)(list(ids.numpy())).blocks[-1], expected)


# --------------------------------------------------------------------------------------- with heads


@pytest.mark.parametrize("modality", MODELS)
def test_a_model_with_a_head_gives_the_same_outputs(modality: str, tmp_path: Path) -> None:
    task, _ = base(modality)
    settings: dict[str, Any] = {"num_labels": 5}
    if modality == "speech":
        settings = {"vocab_size": 5}
        vocabulary = {label: i for i, label in enumerate(LABELS)}
        (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    model = with_head(modality, **settings)
    model.save_pretrained(tmp_path)
    found = open_weights(tmp_path)
    x = inputs(task, modality)
    encoder, head = build_encoder(found), found.tensors("head")
    batch = task.modalities[modality].unmasked(variants.examples(task, 40, 40))
    with torch.no_grad():
        expected = model(**{ARGUMENTS[modality]: x}).logits
        out, _, layers = encoder.whole(batch, encoder.features(batch), collect=1)
    if modality == "vision":
        mean = layers[-1][1].mean(1)
        out = F.layer_norm(mean, (32,), head["head.norm.weight"], head["head.norm.bias"], 1e-6)
    elif modality == "text":
        dense = F.linear(out[:, 0], head["head.dense.weight"], head["head.dense.bias"])
        out = torch.tanh(dense)
    close(F.linear(out, head["head.proj.weight"], head["head.proj.bias"]), expected)
    if modality == "speech":
        assert found.finetune == {"task": "ctc", "labels": ["<blank>", *LABELS[1:]]}
        assert list(found.files) == ["vocab.json"]
    else:
        labels = [f"LABEL_{i}" for i in range(5)]
        assert found.finetune == {"task": "classification", "labels": labels}


def test_what_fine_tuned_models_lack_is_filled_in(tmp_path: Path) -> None:
    with_head("vision", use_mask_token=False).save_pretrained(tmp_path / "vision")
    found = open_weights(tmp_path / "vision")
    student = found.tensors("student")
    assert not student["encoder.front_ends.vision.mask_token.embedding"].any()
    assert student["encoder.trunk.norm.weight"].eq(1).all()
    assumed = found.about["assumed"]
    assert "The mask token is zero: the source has none." in assumed
    assert "The norm after the last block changes nothing: the source has none." in assumed


def test_the_blank_becomes_the_first_label(tmp_path: Path) -> None:
    model = with_head("speech", vocab_size=5, pad_token_id=4)
    model.save_pretrained(tmp_path)
    labels = ["E", "_", "T", "A", "<pad>"]
    (tmp_path / "vocab.json").write_text(json.dumps({k: i for i, k in enumerate(labels)}))
    (tmp_path / "tokenizer_config.json").write_text('{"word_delimiter_token": "_"}')
    found = open_weights(tmp_path)
    assert found.finetune["labels"] == ["<blank>", "E", "|", "T", "A"]
    weight = model.lm_head.weight
    assert torch.equal(found.tensors("head")["head.proj.weight"], weight[[4, 0, 1, 2, 3]])


def test_symbols_that_were_added_to_a_vocabulary(tmp_path: Path) -> None:
    """Tokenizers that are made from a corpus keep <s> and </s> in a file of their own."""
    with_head("speech", vocab_size=5).save_pretrained(tmp_path)
    (tmp_path / "vocab.json").write_text('{"[PAD]": 0, "|": 1, "e": 2}')
    (tmp_path / "added_tokens.json").write_text('{"<s>": 3, "</s>": 4}')
    assert open_weights(tmp_path).finetune["labels"] == ["<blank>", "|", "e", "<s>", "</s>"]


@pytest.mark.parametrize("modality", ["vision", "text"])
def test_an_epsilon_that_is_not_given_is_that_of_the_class(modality: str, tmp_path: Path) -> None:
    _, model = base(modality)
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    del config["layer_norm_eps"]
    path.write_text(json.dumps(config))
    assert open_weights(tmp_path).model["norm_eps"] == type(model.config)().layer_norm_eps == 1e-12


def test_one_output_is_regression(tmp_path: Path) -> None:
    with_head("text", num_labels=1).save_pretrained(tmp_path)
    assert open_weights(tmp_path).finetune["task"] == "regression"


@pytest.mark.parametrize("bos", [0, 2, None])
def test_ids_of_their_tokenizer_begin_with_bos(bos: int | None, tmp_path: Path) -> None:
    model = with_head("text", num_labels=3, bos_token_id=bos)
    model.save_pretrained(tmp_path)
    ids = [np.array([*([bos] * (bos is not None)), 7, 8, 9, 2])]
    with torch.no_grad():
        expected = model(torch.tensor(np.stack(ids))).logits
        close(load_finetuned(tmp_path)(ids).values, expected)


def test_other_heads_are_left_out_and_reported(tmp_path: Path) -> None:
    from transformers import Data2VecTextForMaskedLM

    _, model = base("text")
    Data2VecTextForMaskedLM(model.config).save_pretrained(tmp_path)
    found = open_weights(tmp_path)
    assert found.tensors("head") == {} and found.finetune == {}
    assert "lm_head.dense.weight" in found.about["left_out"]
    build_encoder(found)


def relative_tables(tmp_path: Path, equal: bool) -> Any:
    model = with_head(
        "vision", use_shared_relative_position_bias=False, use_relative_position_bias=True
    )
    layers = model.data2vec_vision.encoder.layer
    if equal:
        tables = [e.attention.attention.relative_position_bias for e in layers]
        for other in tables[1:]:
            other.load_state_dict(tables[0].state_dict())
    model.save_pretrained(tmp_path)
    return model


def test_equal_tables_of_relative_positions(tmp_path: Path) -> None:
    model = relative_tables(tmp_path, equal=True)
    task, _ = base("vision")
    encoder = load_encoder(tmp_path)
    with torch.no_grad():
        expected = model(inputs(task, "vision"), output_hidden_states=True).hidden_states[-1]
        found = encoder(variants.examples(task, 40, 40)).blocks[-1]
    close(found, expected[:, 1:])


def test_different_tables_of_relative_positions_are_an_error(tmp_path: Path) -> None:
    relative_tables(tmp_path, equal=False)
    with pytest.raises(UserError, match="the layers of this project share one"):
        open_weights(tmp_path)


# -------------------------------------------------------------------------------------- bad folders


def index(folder: Path, **files: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


def damage(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])


QUERY = "encoder.layers.0.attention.q_proj.weight"
BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "type": (lambda f: edit_config(f, model_type="bert"), "has model_type 'bert'; supported are"),
    "no type": (lambda f: (f / "config.json").write_text("{}"), "has model_type None"),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json: not valid JSON"),
    "a list": (lambda f: (f / "config.json").write_text("[]"), "expected a JSON object"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has no weights"),
    "damaged": (damage, "model.safetensors is damaged"),
    "activation": (lambda f: edit_config(f, hidden_act="relu"), "hidden_act='relu' is not"),
    "epsilon": (lambda f: edit_config(f, layer_norm_eps=1e-12), "layer_norm_eps=1e-12 is not"),
    "heads": (lambda f: edit_config(f, num_attention_heads=5), "not divisible by heads=5"),
    "strides": (lambda f: edit_config(f, conv_stride=[5, 2]), "has 7 convolutions, but its conf"),
    "unknown": (
        lambda f: edit_state(f, lambda t: t.update({"encoder.adapter.weight": torch.ones(1)})),
        r"encoder\.adapter\.weight: no parameter of transformers' data2vec for speech",
    ),
    "missing": (
        lambda f: edit_state(f, lambda t: t.pop("encoder.layers.2.final_layer_norm.bias")),
        r"blocks\.2\.norm2\.bias is missing",
    ),
    "type of type": (lambda f: edit_config(f, model_type=["x"]), r"has model_type \['x'\]"),
    "type of classes": (
        lambda f: edit_config(f, architectures=3),
        "architectures=3, expected a list",
    ),
    "type of strides": (lambda f: edit_config(f, conv_stride=2), "conv_stride=2, expected a list"),
    "type of padding": (lambda f: edit_config(f, pad_token_id="x"), "pad_token_id='x', expected"),
    "no heads": (
        lambda f: edit_config(f, num_attention_heads=0),
        "its settings are not possible: model.heads: must be",
    ),
    "shapes": (
        lambda f: edit_state(f, lambda t: t.update({QUERY: torch.zeros(3, 5)})),
        r"attention\.qkv\.weight: \[3, 5\], \[32, 32\], \[32, 32\] do not fit",
    ),
    "outside": (lambda f: index(f, a="../other.safetensors"), "outside the folder"),
    "missing shard": (lambda f: index(f, a="a.safetensors"), "lacks a.safetensors"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_folders_are_one_line(name: str, tmp_path: Path) -> None:
    _, model = base("speech")
    model.save_pretrained(tmp_path)
    edit, message = BAD[name]
    edit(tmp_path)
    with pytest.raises(UserError, match=message) as raised:
        open_weights(tmp_path)
    assert "\n" not in str(raised.value)


def test_a_malicious_bin_is_refused(tmp_path: Path) -> None:
    _, model = base("speech")
    model.save_pretrained(tmp_path)
    marker = tmp_path / "marker"
    state = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    bad = {**state, "more": Call(os.system, f"touch {marker}")}
    torch.save(bad, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin contains posix\.system"):
        open_weights(tmp_path)
    assert not marker.exists()


def test_a_head_without_its_labels_or_pooling(tmp_path: Path) -> None:
    with_head("speech", vocab_size=5).save_pretrained(tmp_path / "speech")
    with pytest.raises(UserError, match=r"lacks vocab\.json"):
        open_weights(tmp_path / "speech")
    (tmp_path / "speech" / "vocab.json").write_text('{"a": 0, "b": 1}')
    with pytest.raises(UserError, match=r"vocab\.json has no label for row 2"):
        open_weights(tmp_path / "speech")
    with_head("vision", use_mean_pooling=False).save_pretrained(tmp_path / "vision")
    with pytest.raises(UserError, match="classifies the class token"):
        open_weights(tmp_path / "vision")


def test_a_path_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "exists", refused)  # the tests may run as root
    with pytest.raises(UserError, match=r"runs/x: must be readable \(Permission denied\)"):
        open_weights("runs/x")


def test_a_path_that_is_too_long() -> None:
    with pytest.raises(UserError, match=r"a: cannot be read \(File name too long\)"):
        open_weights("a" * 5000)


def test_what_is_supported_is_listed(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"neither a checkpoint nor a run .*config\.json.*\.pt"):
        open_weights(tmp_path)
    with pytest.raises(UserError, match="no such file or folder"):
        open_weights(tmp_path / "none")
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UserError, match="is one file of a folder; give the folder"):
        open_weights(tmp_path / "model.safetensors")
