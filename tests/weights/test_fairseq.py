"""Checkpoints of fairseq and data2vec_vision, made from our own models, give the same models."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from d2v_ds.encoder import encoder_of, load_encoder
from d2v_ds.errors import UserError
from d2v_ds.key_maps import FAIRSEQ, to_theirs
from d2v_ds.pretrain import Pretrain
from d2v_ds.weights import Which, build_encoder, open_weights
from d2v_ds.weights.fairseq_settings import convolutions
from tests.helpers import fairseq_files, variants
from tests.helpers.fairseq_files import state_of, write
from tests.helpers.golden_fixture import Fixture, fixture_names
from tests.helpers.outside_classes import class_of
from tests.helpers.variants import VARIANTS
from tests.test_key_maps import shaken

WEIGHTS: tuple[Which, ...] = ("student", "teacher")


def task_of(variant: str, *overrides: str) -> Pretrain:
    """A task whose teacher differs from its student, without dropout."""
    task = shaken(variant, *overrides).eval()
    with torch.no_grad():
        for parameter in task.teacher.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return task


def same(ours: Any, expected: dict[str, Tensor]) -> None:
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        assert ours[name].dtype == torch.float32
        assert torch.equal(ours[name], value), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_and_settings_are_those_of_the_model(variant: str, tmp_path: Path) -> None:
    task, config = task_of(variant), Pretrain.resolve(variants.config(variant))
    path = write(task, config, variant, tmp_path / "model.pt")
    found = open_weights(path)
    same(found.tensors("student"), dict(task.student.named_parameters()))
    same(found.tensors("teacher"), dict(task.teacher.named_parameters()))
    assert found.tensors("head") == {} and found.finetune == {}
    assert found.step == 1200 and found.only_modality() == variant[3:]
    assert found.model == config.model | {"layer_drop": found.model["layer_drop"]}
    # What neither the tensors nor the original configuration have, and is listed as assumed.
    free = {"cls_views", "crop_scale", "crop_seconds", "jitter", "position_std", "pad_id"}
    free |= {"decoder", "head"}  # those that the variant does not use
    if variant == "v1_vision":  # a mean over channels; the variant has that of another width
        free |= {"loss_scale"}
        assert found.modality["vision"]["loss_scale"] == 1 / 32
    ours, expected = found.modality[variant[3:]], config.modality[variant[3:]]
    assert {k: v for k, v in ours.items() if k not in free} == {
        k: v for k, v in expected.items() if k not in free
    }
    used = "decoder" if variant.startswith("v2") else "head"
    assert ours[used] | {"zero_last": False} == expected[used] | {"zero_last": False}


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_features_are_those_of_the_model(variant: str, weights: Which, tmp_path: Path) -> None:
    task, config = task_of(variant), Pretrain.resolve(variants.config(variant))
    path = write(task, config, variant, tmp_path / "model.pt")
    examples = variants.examples(task, 30, 40)
    with torch.no_grad():
        expected = encoder_of(task, variant[3:], weights)(examples)
        found = load_encoder(path, weights=weights)(examples)
    for ours, theirs in zip(found.blocks, expected.blocks, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", fixture_names())
def test_the_configurations_of_the_originals(name: str, tmp_path: Path) -> None:
    """The golden fixtures have the names, tensors and resolved settings of the original code."""
    golden = Fixture(name)
    modality, version = golden.variant
    state: dict[str, Any] = dict(golden.group("student"))
    content: dict[str, Any] = {"model": state}
    if (modality, version) == ("vision", "1.0"):
        content |= {"model_ema": golden.group("teacher")}
    else:
        state["encoder._ema" if name == "v1_text_full" else "_ema"] = golden.group("teacher")
        content |= {"cfg": {"model": golden.meta["resolved"]}}
    torch.save(content, tmp_path / "model.pt")
    found = open_weights(tmp_path / "model.pt")
    task = golden.task()
    same(found.tensors("student"), dict(task.student.named_parameters()))
    same(found.tensors("teacher"), dict(task.teacher.named_parameters()))
    expected = Pretrain.resolve(golden.config)
    skipped = {"attention_dropout", "drop_path", "layer_scale"}  # the vision fixture has no args
    kept = {k for k in expected.model if version == "2.0" or k not in skipped}
    assert {k: found.model[k] for k in kept} == {k: expected.model[k] for k in kept}
    ours, theirs = found.modality[modality], expected.modality[modality]
    # The context of text has no parameters, so it does not matter whether it is shared.
    assert set(ours["shared"]) == set(theirs["shared"]) - (
        {"context"} if modality == "text" else set()
    )
    for key in ("views", "masked", "loss_beta", "loss_scale", "prenet_depth"):
        assert ours[key] == theirs[key], key


def test_without_a_configuration_the_published_model_is_assumed(tmp_path: Path) -> None:
    wide = ("model.dim=768", "model.heads=12", "model.depth=2")
    task = variants.build("v1_text", *wide)
    state = to_theirs(task.student.state_dict(), FAIRSEQ["text", "1.0"])
    torch.save(state, tmp_path / "model.pt")  # no "model" around it either
    found = open_weights(tmp_path / "model.pt")
    assert found.model["heads"] == 12 and found.model["norm_eps"] == 1e-5
    assert found.modality["text"]["shared"] == ["features"]
    assumed = found.about["assumed"]
    assert "The file has no configuration." in assumed
    expected = "model.heads=12, as in the recipe text_base_v1: the source does not say."
    assert expected in assumed
    with pytest.raises(UserError, match="has no teacher's weights"):
        build_encoder(found, "teacher")


# ----------------------------------------------------------------------------------- old formats


def test_half_precision_becomes_fp32(tmp_path: Path) -> None:
    task, config = task_of("v2_vision"), Pretrain.resolve(variants.config("v2_vision"))
    path = write(task, config, "v2_vision", tmp_path / "model.pt", student=torch.Tensor.half)
    found = open_weights(path)
    halves = {n: p.half().float() for n, p in task.student.named_parameters()}
    same(found.tensors("student"), halves)
    same(found.tensors("teacher"), dict(task.teacher.named_parameters()))


def edited(variant: str, path: Path, edit: Callable[[dict[str, Any]], None]) -> Path:
    """A checkpoint of a variant, changed by `edit` before it is written."""
    task, config = variants.build(variant), Pretrain.resolve(variants.config(variant))
    content = fairseq_files.content(task, config, variant)
    edit(content)
    torch.save(content, path)
    return path


def test_old_names_and_shapes(tmp_path: Path) -> None:
    def four_dimensions(content: dict[str, Any]) -> None:
        name = "modality_encoders.AUDIO.alibi_scale"
        content["model"][name] = content["model"][name][0]

    def one_scale(content: dict[str, Any]) -> None:
        content["model"]["modality_encoders.AUDIO.alibi_scale"] = torch.full((1, 1, 1, 1, 1), 0.5)
        del content["model"]["_ema"]

    def positions(content: dict[str, Any]) -> None:
        image = "modality_encoders.IMAGE"
        value = content["model"].pop(f"{image}.fixed_positional_encoder.positions")
        content["model"][f"{image}.positional_encoder.pos_embed"] = value

    def numbered(content: dict[str, Any]) -> None:
        for kind in ("weight", "bias"):
            content["model"][f"final_proj.0.{kind}"] = content["model"].pop(f"final_proj.{kind}")

    def versions(content: dict[str, Any]) -> None:
        content["model"]["encoder.sentence_encoder.version"] = torch.tensor([3.0])
        content["model"]["encoder.lm_head.dense.weight"] = torch.zeros(3, 3)

    scale = "encoder.front_ends.speech.bias.scale"
    found = open_weights(edited("v2_speech", tmp_path / "a.pt", four_dimensions))
    assert found.tensors("student")[scale].shape == (4,)
    found = open_weights(edited("v2_speech", tmp_path / "b.pt", one_scale))
    assert found.tensors("student")[scale].tolist() == [0.5] * 4
    open_weights(edited("v2_vision", tmp_path / "c.pt", positions))
    found = open_weights(edited("v1_speech", tmp_path / "d.pt", numbered))
    assert "predictors.speech.proj.weight" in found.tensors("student")
    found = open_weights(edited("v1_text", tmp_path / "e.pt", versions))
    assert found.about["left_out"] == ["encoder.lm_head.dense.weight"]


def test_the_teacher_of_an_encoder_only_average(tmp_path: Path) -> None:
    """fairseq's ema_encoder_only: only the blocks are averaged, with names relative to them."""

    def blocks(content: dict[str, Any]) -> None:
        averages = content["model"]["_ema"]
        content["model"]["_ema"] = {
            name.removeprefix("blocks."): value
            for name, value in averages.items()
            if name.startswith("blocks.")
        } | {"__sq_mom": {}}

    found = open_weights(edited("v2_speech", tmp_path / "a.pt", blocks))
    assert found.modality["speech"]["shared"] == ["features", "positions", "context"]
    build_encoder(found, "teacher")


def test_arguments_of_older_files(tmp_path: Path) -> None:
    """Before Hydra, fairseq stored the arguments in one flat Namespace."""

    def flat(content: dict[str, Any]) -> None:
        settings = content.pop("cfg")
        content["args"] = argparse.Namespace(**settings["model"], normalize=False)

    found = open_weights(edited("v1_speech", tmp_path / "a.pt", flat))
    assert found.model["heads"] == 4
    assert any("not normalised" in sentence for sentence in found.about["assumed"])


def test_convolutions_are_read_without_evaluation() -> None:
    published = "[(512, 10, 5)] + [(512, 3, 2)] * 4 + [(512,2,2)] + [(512,2,2)]"
    assert convolutions(published) == [[512, 10, 5], *[[512, 3, 2]] * 4, *[[512, 2, 2]] * 2]
    for text in ("[(1, 2, 3)] * 10**9", "__import__('os')", "[(1, 2)]", "3", "[", "[(1,2,3)]*999"):
        with pytest.raises(ValueError, match="no list of convolutions"):
            convolutions(text)


# --------------------------------------------------------------------------------- fine-tuned CTC


@pytest.mark.parametrize("variant", ["v1_speech", "v2_speech"])
def test_a_fine_tuned_speech_model(
    variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, config = task_of(variant), Pretrain.resolve(variants.config(variant))
    inner = fairseq_files.content(task, config, variant)
    kept = {
        f"w2v_encoder.w2v_model.{name}": value
        for name, value in inner["model"].items()
        if name != "_ema" and not name.startswith("final_proj") and ".decoder." not in name
    }
    head = {
        "w2v_encoder.proj.weight": torch.randn(6, 32),
        "w2v_encoder.proj.bias": torch.randn(6),
    }
    dictionary: Any = class_of(monkeypatch, "fairseq.data.dictionary", "Dictionary")()
    dictionary.symbols = ["<s>", "<pad>", "</s>", "<unk>", "|", "E"]
    content = {
        "model": kept | head,
        "cfg": {"model": {"_name": "wav2vec_ctc", "w2v_args": inner["cfg"]}},
        "task_state": {"target_dictionary": dictionary},
    }
    torch.save(content, tmp_path / "ctc.pt")
    found = open_weights(tmp_path / "ctc.pt")
    labels = ["<blank>", "<pad>", "</s>", "<unk>", "|", "E"]
    assert found.finetune == {"task": "ctc", "labels": labels}
    same(
        found.tensors("head"),
        {f"head.proj.{p}": head[f"w2v_encoder.proj.{p}"] for p in ("weight", "bias")},
    )
    encoder = {f"encoder.{n}": p for n, p in task.student.encoder.named_parameters()}
    same(found.tensors("student"), encoder)
    build_encoder(found)

    del content["task_state"]
    torch.save(content, tmp_path / "ctc.pt")
    with pytest.raises(UserError, match="lacks the dictionary of its labels"):
        open_weights(tmp_path / "ctc.pt")


# -------------------------------------------------------------------------------------- bad files


def drop(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda content: content["model"].pop(name)


def put(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content["model"].update({name: value})


def put_setting(section: str, name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def edit(content: dict[str, Any]) -> None:
        settings = content["cfg"]["model"]
        for key in filter(None, section.split(".")):
            settings = settings[key]
        settings[name] = value

    return edit


IMAGE = "modality_encoders.IMAGE.fixed_positional_encoder.positions"
BAD: dict[str, tuple[str, Callable[[dict[str, Any]], None], str]] = {
    "unknown name": ("v1_speech", put("quantizer.vars", torch.zeros(1)), r"quantizer\.vars: no"),
    "missing name": ("v1_speech", drop("layer_norm.bias"), r"features\.norm\.bias is missing"),
    "missing part": (
        "v1_text",
        drop("encoder.sentence_encoder.layers.1.self_attn.k_proj.bias"),
        r"layers\.1\.self_attn\.k_proj\.bias is missing",
    ),
    "missing block": ("v2_text", drop("blocks.0.norm1.weight"), r"lacks .*blocks\.0\.norm1"),
    "shape": (
        "v2_text",
        put("blocks.1.norm1.weight", torch.zeros(5)),
        r"blocks\.1\.norm1\.weight has shape \[5\], expected \[32\]",
    ),
    "teacher's name": (
        "v2_text",
        lambda content: content["model"]["_ema"].update({"9.norm1.weight": torch.zeros(32)}),
        r"the teacher's encoder\.trunk\.blocks\.9\.norm1\.weight is no parameter",
    ),
    "teacher's unknown": (
        "v2_text",
        lambda content: content["model"]["_ema"].update({"quantizer": torch.zeros(32)}),
        "quantizer: no parameter of its teacher",
    ),
    "teacher's missing": (
        "v2_text",
        lambda content: content["model"]["_ema"].pop("1.norm1.weight"),
        r"the teacher's encoder\.trunk\.blocks\.1\.norm1\.weight is missing",
    ),
    "positions": ("v2_vision", put(IMAGE, torch.zeros(1, 64, 32)), "sine-cosine positions"),
    "pre-norm": (
        "v2_speech",
        put_setting("", "layer_norm_first", True),
        r"model\.layer_norm_first=True is not supported",
    ),
    "convolutions": (
        "v2_speech",
        put_setting("modalities.audio", "feature_encoder_spec", "os.system('x')"),
        "no list of convolutions",
    ),
    "heads": ("v2_text", put_setting("", "num_heads", 5), "not divisible by heads=5"),
    "no heads": ("v2_text", put_setting("", "num_heads", None), "how many attention heads"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_one_line(name: str, tmp_path: Path) -> None:
    variant, edit, message = BAD[name]
    path = edited(variant, tmp_path / "model.pt", edit)
    with pytest.raises(UserError, match=message) as raised:
        open_weights(path)
    assert "\n" not in str(raised.value)


def test_strides_of_other_kernels_must_be_stored(tmp_path: Path) -> None:
    convs = "modality.speech.convs=[[8, 10, 5], [8, 5, 4], [16, 4, 4]]"
    task = variants.build("v1_speech", convs, "modality.speech.min_seconds=0.5")
    config = Pretrain.resolve(variants.config("v1_speech"))
    content = fairseq_files.content(task, config, "v1_speech")
    del content["cfg"]["model"]["conv_feature_layers"]
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(UserError, match="says nowhere which strides its convolutions have"):
        open_weights(tmp_path / "model.pt")


def test_several_models_in_one_file(tmp_path: Path) -> None:
    task = variants.build("v2_text")
    state = state_of(task, "v2_text")
    state["modality_encoders.IMAGE.local_encoder.proj.weight"] = torch.zeros(1)
    torch.save({"model": state}, tmp_path / "model.pt")
    with pytest.raises(UserError, match=r"parts of several models \(text, vision\)"):
        open_weights(tmp_path / "model.pt")
