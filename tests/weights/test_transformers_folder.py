"""Folders of transformers, written by its own classes, and folders in the format of our exports."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from d2v_ds.data.audio import import_torchaudio
from d2v_ds.encoder import encoder_of, load_encoder
from d2v_ds.errors import UserError
from d2v_ds.finetune.model import load_finetuned
from d2v_ds.key_maps import HUGGING_FACE, to_theirs
from d2v_ds.pretrain import Pretrain
from d2v_ds.weights import build_encoder, open_weights
from tests.helpers import variants
from tests.helpers.variants import VARIANTS
from tests.test_key_maps import ARGUMENTS, MODELS, shaken
from tests.weights.test_unpickle import Call

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

LABELS = ["<pad>", "|", "E", "T", "A"]


@pytest.fixture(scope="module", autouse=True)
def torchaudio_imported() -> None:
    """Imports torchaudio before transformers does, with our workaround for a mismatched wheel."""
    import_torchaudio()


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


# ------------------------------------------------------------------------------------- our exports


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


# -------------------------------------------------------------------------------------- bad folders


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_state(folder: Path, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


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
    "no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json: cannot be read"),
    "a list": (lambda f: (f / "config.json").write_text("[]"), "is not a JSON object"),
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
    "no heads": (lambda f: edit_config(f, num_attention_heads=0), "not divisible by heads=0"),
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
        ({"model": {"dim": 12 * 10**11}}, "its settings describe no model"),
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
