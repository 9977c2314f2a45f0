"""Checkpoints as fairseq and data2vec_vision write them, made from our own models."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2v_ds.config import Config
from d2v_ds.key_maps import FAIRSEQ, to_theirs
from d2v_ds.pretrain import Pretrain

PARTS = {"v1_speech": "encoder.", "v1_text": "encoder.sentence_encoder.", "v2_text": "blocks."}


def rules_of(variant: str) -> Any:
    return FAIRSEQ[variant[3:], {"v1": "1.0", "v2": "2.0"}[variant[:2]]]


def state_of(task: Pretrain, variant: str) -> dict[str, Any]:
    return dict(to_theirs(task.student.state_dict(), rules_of(variant)))


def averages_of(task: Pretrain, variant: str) -> dict[str, Tensor]:
    """Of the teacher, with names relative to the averaged part. The original also keeps copies of
    parts of the student that it does not average."""
    whole = dict(task.student.encoder.state_dict(prefix="encoder."))
    whole |= task.teacher.encoder.state_dict(prefix="encoder.")
    theirs = to_theirs(whole, rules_of(variant))
    part = PARTS.get(variant, "")
    if variant == "v2_speech":  # its teacher shares the features
        left = ("local_encoder", "project_features")
        theirs = {n: v for n, v in theirs.items() if not n.split(".")[2].startswith(left)}
    return {n.removeprefix(part): v for n, v in theirs.items() if n.startswith(part)}


def content(task: Pretrain, config: Config, variant: str) -> dict[str, Any]:
    """The content of the file. `optimizer_history` and the metrics are as in real ones."""
    state, averages = state_of(task, variant), averages_of(task, variant)
    modality = config.modality[variant[3:]]
    common: dict[str, Any] = {"extra_state": {"epoch": 3, "val_loss": 1.5}, "epoch": 3}
    common["optimizer_history"] = [{"num_updates": 600}, {"num_updates": 1200}]
    if variant == "v1_vision":
        return {
            **common,
            "model": state | {"rel_pos_bias.relative_position_index": torch.zeros(65, 65).long()},
            "model_ema": averages,
            "args": argparse.Namespace(**beit_arguments(config.model, modality)),
        }
    state["encoder._ema" if variant == "v1_text" else "_ema"] = averages
    settings = {
        "v1_speech": speech_v1,
        "v1_text": text_v1,
        "v2_speech": model_v2,
        "v2_vision": model_v2,
        "v2_text": model_v2,
    }[variant](config.model, modality)
    name = variant[3:]
    return {
        **common,
        "args": None,
        "model": state,
        "cfg": {"_name": None, "model": settings, "task": data(name, modality)},
    }


def write(
    task: Pretrain,
    config: Config,
    variant: str,
    path: Path,
    student: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> Path:
    """student: applied to the student's tensors."""
    made = content(task, config, variant)
    made["model"] = {
        name: student(value) if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in made["model"].items()
    }
    torch.save(made, path)
    return path


def data(name: str, modality: dict[str, Any]) -> dict[str, Any]:
    if name == "speech":
        rate = modality["sample_rate"]
        return {
            "_name": "audio_pretraining",
            "sample_rate": rate,
            "max_sample_size": round(modality["crop_seconds"] * rate),
            "min_sample_size": round(modality["min_seconds"] * rate),
            "normalize": True,
        }
    mask = modality["mask"]
    if name == "text":
        return {
            "_name": "masked_lm",
            "mask_prob": mask["prob"],
            "mask_multiple_length": mask["length"],
            "random_token_prob": mask["random_prob"],
            "leave_unmasked_prob": mask["keep_prob"],
        }
    return {"_name": "mae_image_pretraining"}


def drops(model: dict[str, Any]) -> dict[str, Any]:
    return {k: model[k] for k in ("dropout", "attention_dropout", "activation_dropout")}


def speech_v1(model: dict[str, Any], modality: dict[str, Any]) -> dict[str, Any]:
    return {
        "_name": "data2vec_audio",
        "extractor_mode": "layer_norm",
        "layer_norm_first": False,
        "encoder_layers": model["depth"],
        "encoder_attention_heads": model["heads"],
        "encoder_layerdrop": model["layer_drop"],
        "conv_feature_layers": str([tuple(conv) for conv in modality["convs"]]),
        "conv_bias": False,
        "mask_prob": modality["mask"]["prob"],
        "mask_length": modality["mask"]["length"],
        "loss_beta": modality["loss_beta"],
        "loss_scale": modality["loss_scale"],
        "ema_layers_only": "positions" in modality["shared"],
        **drops(model),
    }


def text_v1(model: dict[str, Any], modality: dict[str, Any]) -> dict[str, Any]:
    encoder = {"attention_heads": model["heads"], "layerdrop": model["layer_drop"]}
    return {
        "_name": "data2vec_text",
        "transformer": {
            "encoder": encoder | {"normalize_before": False},
            "no_scale_embedding": True,
            **drops(model),
        },
        "loss_beta": modality["loss_beta"],
        "loss_scale": modality["loss_scale"],
        "ema_transformer_layers_only": "features" in modality["shared"],
    }


def beit_arguments(model: dict[str, Any], modality: dict[str, Any]) -> dict[str, Any]:
    mask = modality["mask"]
    return {
        "model": "beit_base_patch16_224",
        "layer_scale_init_value": model["layer_scale"],
        "attn_drop_rate": model["attention_dropout"],
        "drop_path": model["drop_path"],
        "num_mask_patches": mask["patches"],
        "min_mask_patches_per_block": mask["min_patches"],
        "max_mask_patches_per_block": mask["max_patches"],
        "l1_beta": modality["loss_beta"],
        "color_jitter": modality["jitter"],
    }


def model_v2(model: dict[str, Any], modality: dict[str, Any]) -> dict[str, Any]:
    mask, decoder = modality["mask"], modality["decoder"]
    front = {
        "prenet_depth": modality["prenet_depth"],
        "prenet_dropout": modality["prenet_dropout"],
        "prenet_layerdrop": modality["prenet_layer_drop"],
        "mask_prob": mask["prob"],
        "mask_length": mask["length"],
        "mask_prob_adjust": mask.get("adjust", 0.0),
        "inverse_mask": mask.get("inverse", False),
        "mask_noise_std": decoder["noise"],
        "decoder": {
            "decoder_dim": decoder["dim"],
            "decoder_layers": decoder["depth"],
            "decoder_kernel": decoder["kernel"],
            "decoder_groups": decoder["groups"],
            "decoder_residual": decoder["residual"],
            "input_dropout": decoder["dropout"],
        },
    }
    if "convs" in modality:
        kind, specification = "audio", str([tuple(conv) for conv in modality["convs"]])
        front |= {"feature_encoder_spec": specification, "extractor_mode": "layer_norm"}
    else:
        kind = "text" if "vocab_size" in modality else "image"
        front |= {"dropout": modality.get("dropout", 0.0)}
    return {
        "_name": "data2vec_multi",
        "num_heads": model["heads"],
        "norm_eps": model["norm_eps"],
        "encoder_dropout": model["dropout"],
        "attention_dropout": model["attention_dropout"],
        "activation_dropout": model["activation_dropout"],
        "end_drop_path_rate": model["drop_path"],
        "layerdrop": model["layer_drop"],
        "layer_norm_first": False,
        "clone_batch": modality["views"],
        "cls_loss": modality["cls_weight"],
        "loss_beta": modality["loss_beta"],
        "loss_scale": modality["loss_scale"],
        "modalities": {kind: front},
    }
