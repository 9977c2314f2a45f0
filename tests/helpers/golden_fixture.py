"""Reads a golden fixture (tests/golden/README.md): the task, the batch and the expected arrays.

Everything is built from the fixture's own description of its model, with compat=fairseq. Settings
that the description does not name follow the original code.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from d2v_ds.batch import Batch, mask_indices
from d2v_ds.config import Config
from d2v_ds.config.compat import apply_compat
from d2v_ds.config.decoding import decode
from d2v_ds.key_maps import FAIRSEQ, Rule, to_ours, to_theirs
from d2v_ds.modalities.speech import token_count
from d2v_ds.pretrain import Pretrain
from tests import ROOT

FOLDER = Path(os.environ.get("D2V_GOLDEN", ROOT / "tests" / "golden"))

MODALITIES = {"audio": "speech", "image": "vision", "vision": "vision", "text": "text"}


def fixture_names() -> list[str]:
    return sorted(p.stem for p in FOLDER.glob("v*.npz") if not p.stem.endswith("_traj"))


@dataclass
class Fixture:
    name: str

    @cached_property
    def variant(self) -> tuple[str, str]:
        """(modality, version)."""
        version, kind = self.meta["name"].split("_")[:2]
        return MODALITIES[kind], {"v1": "1.0", "v2": "2.0"}[version]

    @property
    def modality(self) -> str:
        return self.variant[0]

    @property
    def rules(self) -> list[Rule]:
        return FAIRSEQ[self.variant]

    @cached_property
    def arrays(self) -> dict[str, Tensor]:
        with np.load(FOLDER / f"{self.name}.npz") as archive:
            return {
                key: torch.from_numpy(archive[key])
                for key in archive.files
                if archive[key].dtype.kind not in "US"
            }

    @cached_property
    def meta(self) -> dict[str, Any]:
        with np.load(FOLDER / f"{self.name}.npz") as archive:
            return json.loads(str(archive["meta_json"]))

    @cached_property
    def trajectory(self) -> dict[str, Tensor]:
        with np.load(FOLDER / f"{self.name}_traj.npz") as archive:
            return {key: torch.from_numpy(archive[key]) for key in archive.files}

    def has_trajectory(self) -> bool:
        return (FOLDER / f"{self.name}_traj.npz").is_file()

    def group(self, prefix: str) -> dict[str, Tensor]:
        """Arrays whose names start with `prefix`/, by the rest of the name."""
        return {
            key.removeprefix(prefix + "/"): value
            for key, value in self.arrays.items()
            if key.startswith(prefix + "/")
        }

    @property
    def teacher_prefix(self) -> str:
        """The prefix that the student's names have and the teacher's lack."""
        tracks = str(self.meta.get("ema_tracks", ""))
        return tracks if tracks.endswith(".") else ""

    def teacher(self, arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Their teacher's arrays under the student's names."""
        return {self.teacher_prefix + name: value for name, value in arrays.items()}

    def theirs(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Renames tensors from our student's names to theirs."""
        return to_theirs(state, self.rules)

    @cached_property
    def config(self) -> Config:
        settings = {"1.0": settings_v1, "2.0": settings_v2}[self.variant[1]]
        raw = settings(self.modality, self.meta)
        raw["compat"] = "fairseq"
        apply_compat(raw, over=True)
        # BEiT's code uses torch's AdamW and lists the parameters without weight decay.
        if "train" in self.meta:
            raw["optim"] |= {"decay_all": False, "adam_eps": "torch"}
        if self.meta["name"].startswith("v1_text_full"):
            raw["modality"]["text"]["text_teacher"] = "whole"
        return decode(Config, raw | {"run": {"steps": 10}, "engine": LOCAL})

    @property
    def decay(self) -> float:
        """Decay of the EMA update after the optimizer step."""
        return self.config.teacher.decay

    def task(self) -> Pretrain:
        """Our task with the fixture's weights, except those that `separate` sets."""
        task = Pretrain.create(self.config)
        task.student.load_state_dict(to_ours(self.group("student"), self.rules), strict=True)
        with torch.no_grad():
            for name, value in self.averages(task).items():
                task.get_parameter(name).copy_(value)
        return task.train()

    def teacher_arrays(self) -> dict[str, Tensor]:
        """Their teacher before the step, under our names."""
        theirs = to_ours(self.teacher(self.group("teacher")), self.rules)
        return {"teacher." + name: value for name, value in theirs.items()}

    def averages(self, task: Pretrain) -> dict[str, Tensor]:
        """The values of our teacher's parameters. Asserts that none is missing and that any extra
        ones are shared with the student or never used."""
        theirs = self.teacher_arrays()
        own = dict(task.teacher.named_parameters(prefix="teacher"))
        assert own.keys() <= theirs.keys(), f"not in the fixture: {own.keys() - theirs.keys()}"
        shared = tuple(f"teacher.{FRONT_END}.{name}." for name in self.shared)
        shared = tuple(name.format(self.modality) for name in shared)
        unused = (f"teacher.{FRONT_END}.mask_token.", "teacher.predictors.{}.")
        fixed = (f"teacher.{FRONT_END}.features.positions",)
        left = (*shared, *(name.format(self.modality) for name in unused + fixed))
        for name in theirs.keys() - own.keys():
            assert name.startswith(left), f"their teacher averages {name}, ours does not"
        return {name: theirs[name] for name in own}

    @property
    def shared(self) -> tuple[str, ...]:
        return tuple(self.config.modality[self.modality].get("shared", ()))

    def separate(self, task: Pretrain) -> None:
        """Gives the teacher its own copies of the shared parts. The original code copies these
        from the student at every step, so before the first step the fixture has other values."""
        theirs = self.teacher_arrays()
        front_end = task.teacher.encoder.front_end(self.modality)
        source = task.student.encoder.front_end(self.modality)
        for name in self.shared:
            prefix = f"teacher.{FRONT_END.format(self.modality)}.{name}."
            values = {k.removeprefix(prefix): v for k, v in theirs.items() if k.startswith(prefix)}
            if values:
                part = copy.deepcopy(getattr(source, name)).eval().requires_grad_(False)
                part.load_state_dict(values, strict=True)
                setattr(front_end, name, part)

    def share(self, task: Pretrain) -> None:
        """Undoes `separate`."""
        for name in self.shared:
            setattr(task.teacher.encoder.front_end(self.modality), name, None)

    def batch(self) -> Batch:
        arrays, mask = self.arrays, self.arrays["mask"].numpy()
        views = self.config.modality[self.modality]["views"]
        masks = list(mask.reshape(-1, views, mask.shape[-1]))
        removed, text = self.variant[1] == "2.0", self.modality == "text"
        inputs = (
            arrays["batch/samples" if "batch/samples" in arrays else "batch/source"]
            if (not text or removed)
            else arrays["batch/target_tokens"]
        )
        fields: dict[str, Any] = {}
        if text and not removed:
            fields["corrupted"] = arrays["batch/src_tokens"]
            if self.config.modality["text"]["text_teacher"] == "masked":
                fields["shown"] = torch.from_numpy(mask)
        return Batch(
            modality=self.modality,
            index=0,
            inputs=inputs,
            views=views,
            **fields,
            **mask_indices(masks, removed=removed, valid=self.valid()),
        )

    def valid(self) -> Any:
        """[B, T], False at padding; None if the fixture has no padding."""
        padding = self.arrays.get("batch/padding_mask")
        if self.modality == "text" and padding is None:
            padding = self.arrays["batch/src_tokens"] == self.meta["special_tokens"]["pad"]
        if padding is None:
            return None
        valid = (~padding.bool()).numpy()
        T = self.arrays["mask"].shape[1]
        if valid.shape[1] == T:
            return valid
        convs = self.config.modality["speech"]["convs"]
        lengths = np.array([token_count(int(n), convs) for n in valid.sum(1)])
        return np.arange(T) < lengths[:, None]


FRONT_END = "encoder.front_ends.{}"
LOCAL = {"config": "local", "precision": "fp32"}


def norm_kinds(resolved: Mapping[str, Any]) -> dict[str, Any]:
    """`target.*` from fairseq's switches."""

    def kind(instance: bool, layer: bool) -> str:
        assert not (instance and layer), "one normalisation at a time"
        return "instance" if instance else "layer" if layer else "none"

    return {
        "top_k": resolved["average_top_k_layers"],
        "layer_norm": kind(
            resolved["instance_norm_target_layer"], resolved["layer_norm_target_layer"]
        ),
        "final_norm": kind(resolved["instance_norm_targets"], resolved["layer_norm_targets"]),
        "source": "block" if resolved.get("end_of_block_targets") else "ffn",
    }


def optim(meta: Mapping[str, Any]) -> dict[str, Any]:
    """`optim.*` and `teacher.*` from the description of a fairseq fixture."""
    adam, tau = meta["adam"], meta["ema_tau"]
    return {
        "optim": {key: adam[key] for key in ("lr", "betas", "eps", "weight_decay")}
        | {"clip": meta["clip_norm"], "warmup_steps": 0},
        "teacher": {"decay": tau, "decay_end": tau, "anneal_steps": 0},
    }


def convolutions(specification: str) -> Any:
    """The feature extractor's specification, which is Python arithmetic on lists."""
    return eval(specification, {"__builtins__": {}})


def settings_v2(modality: str, meta: Mapping[str, Any]) -> dict[str, Any]:
    """Translates fairseq's resolved configuration of a Data2VecMultiModel to our settings."""
    resolved = meta["resolved"]
    name = {"speech": "audio", "vision": "image", "text": "text"}[modality]
    kind = resolved["modalities"][name]
    decoder = kind["decoder"]
    settings: dict[str, Any] = {
        "views": resolved["clone_batch"],
        "loss_beta": resolved["loss_beta"],
        "loss_scale": resolved["loss_scale"],
        "prenet_depth": kind["prenet_depth"],
        "prenet_dropout": kind["prenet_dropout"],
        "prenet_layer_drop": kind["prenet_layerdrop"],
        "decoder": {
            "dim": decoder["decoder_dim"],
            "depth": decoder["decoder_layers"],
            "kernel": decoder["decoder_kernel"],
            "groups": decoder["decoder_groups"],
            "dropout": decoder["input_dropout"],
            "residual": decoder["decoder_residual"],
            "projection": decoder["projection_layers"] if modality != "vision" else 1,
            "noise": kind["mask_noise_std"],
        },
    }
    mask = {"prob": kind["mask_prob"], "length": kind["mask_length"]}
    blocks = {"adjust": kind["mask_prob_adjust"], "inverse": kind["inverse_mask"]}
    shared = [] if kind["ema_local_encoder"] else ["features"]
    if modality == "speech":
        settings |= speech_features(kind["feature_encoder_spec"]) | {
            "positions": conv_positions(
                kind["conv_pos_width"], kind["conv_pos_depth"], kind["conv_pos_groups"]
            ),
            "alibi": kind["use_alibi_encoder"],
            "mask": mask | blocks,
        }
    elif modality == "vision":
        settings |= {
            "image_size": kind["input_size"],
            "patch_size": kind["patch_size"],
            "extra_tokens": kind["num_extra_tokens"],
            "mask": mask | blocks,
            "cls_weight": resolved["cls_loss"],
        }
    else:
        settings |= text_tokens(meta, kind["max_source_positions"]) | {
            "dropout": kind["dropout"],
            "mask": {"prob": kind["mask_prob"]},
        }
    if resolved["ema_encoder_only"]:
        shared = ["features", "context"]
        shared += ["positions"] if modality == "speech" else []
    return {
        "model": {
            "dim": resolved["embed_dim"],
            "depth": resolved["depth"],
            "heads": resolved["num_heads"],
            "mlp_ratio": resolved["mlp_ratio"],
            "norm_eps": resolved["norm_eps"],
            "dropout": resolved["encoder_dropout"],
            "attention_dropout": resolved["attention_dropout"],
            "activation_dropout": resolved["activation_dropout"],
            "drop_path": resolved["end_drop_path_rate"],
            "layer_drop": resolved["layerdrop"],
        },
        "target": norm_kinds(resolved),
        "modality": {modality: settings | {"shared": shared}},
        **optim(meta),
    }


def speech_features(specification: str) -> dict[str, Any]:
    return {"convs": convolutions(specification), "min_seconds": 0.1}


def conv_positions(width: int, depth: int, groups: int) -> dict[str, Any]:
    return {"depth": depth, "kernel": max(3, width // depth), "groups": groups}


def text_tokens(meta: Mapping[str, Any], longest: int) -> dict[str, Any]:
    special = meta["special_tokens"]
    return {
        "vocab_size": meta["vocab"],
        "pad_id": special["pad"],
        "mask_id": special["mask"],
        "max_tokens": longest,
    }


def settings_v1(modality: str, meta: Mapping[str, Any]) -> dict[str, Any]:
    """Translates the configurations of Data2VecAudioModel, Data2VecTextModel and BEiT's model."""
    if modality == "vision":
        return settings_beit(meta)
    resolved = meta["resolved"]
    settings: dict[str, Any] = {
        "views": 1,
        "masked": "replaced",
        "loss_beta": resolved["loss_beta"],
        "loss_scale": resolved["loss_scale"],
    }
    copied = meta["ema_copied"]
    if modality == "speech":
        model = {
            "dim": resolved["encoder_embed_dim"],
            "depth": resolved["encoder_layers"],
            "heads": resolved["encoder_attention_heads"],
            "mlp_ratio": resolved["encoder_ffn_embed_dim"] / resolved["encoder_embed_dim"],
            "layer_drop": resolved["encoder_layerdrop"],
        }
        drops = resolved
        positions = ["positions"] if any(name.startswith("pos_conv") for name in copied) else []
        settings |= speech_features(resolved["conv_feature_layers"]) | {
            "shared": ["features", *positions],
            "positions": conv_positions(
                resolved["conv_pos"], resolved["pos_conv_depth"], resolved["conv_pos_groups"]
            ),
            "alibi": False,
            "prenet_dropout": resolved["dropout"],
            "mask": {
                "kind": "spans",
                "prob": resolved["mask_prob"],
                "length": resolved["mask_length"],
            },
        }
    else:
        drops, encoder = resolved["transformer"], resolved["transformer"]["encoder"]
        model = {
            "dim": encoder["embed_dim"],
            "depth": encoder["layers"],
            "heads": encoder["attention_heads"],
            "mlp_ratio": encoder["ffn_embed_dim"] / encoder["embed_dim"],
            "layer_drop": encoder["layerdrop"],
        }
        embeddings = ["features"] if "embed_tokens.weight" in copied else []
        settings |= text_tokens(meta, drops["max_source_positions"]) | {
            "shared": embeddings,
            "dropout": drops["dropout"],
            "mask": {"kind": "spans", "prob": 0.35, "length": 4},
            "head": {"layers": resolved["head_layers"]},
        }
    for name in ("dropout", "attention_dropout", "activation_dropout"):
        model[name] = drops[name]
    return {
        "model": model,
        "target": norm_kinds(resolved),
        "modality": {modality: settings},
        **optim(meta),
    }


def settings_beit(meta: Mapping[str, Any]) -> dict[str, Any]:
    model, train = meta["model"], meta["train"]
    layers = train["target_layers"]
    assert layers == list(range(model["depth"] - len(layers), model["depth"])), "the top layers"
    assert model["qkv_bias"] and model["use_shared_rel_pos_bias"] and not train["l2_loss"]
    scale = train["loss_scale"]
    return {
        "model": {
            "dim": model["embed_dim"],
            "depth": model["depth"],
            "heads": model["num_heads"],
            "mlp_ratio": model["mlp_ratio"],
            "norm": "pre",
            "norm_eps": meta["norm_eps"],
            "qkv_bias": "qv",
            "layer_scale": model["init_values"],
            "dropout": 0.0,
            "attention_dropout": model["attn_drop_rate"],
            "drop_path": model["drop_path_rate"],
            "init": "beit",
        },
        "target": {
            "top_k": len(layers),
            "layer_norm": "layer" if train["target_layer_norm_last"] else "none",
            "final_norm": "layer" if train["post_target_layer_norm"] else "none",
            "source": "block" if train["layer_results"] == "end" else "ffn",
        },
        "modality": {
            "vision": {
                "views": 1,
                "masked": "replaced",
                "image_size": model["img_size"],
                "patch_size": model["patch_size"],
                "positions": "relative",
                "loss_beta": train["l1_beta"],
                # a mean over tokens and channels
                "loss_scale": (1 if scale == -1 else scale) / model["embed_dim"],
                "mask": {
                    "kind": "beit",
                    "patches": train["num_mask_patches"],
                    "min_patches": train["min_mask_patches_per_block"],
                    "max_patches": train["max_mask_patches_per_block"],
                },
            }
        },
        "optim": {key: train[key] for key in ("lr", "betas", "eps", "weight_decay")}
        | {"clip": train["clip_grad"], "warmup_steps": 0},
        "teacher": {"decay": train["ema_tau"], "decay_end": train["ema_tau"], "anneal_steps": 0},
    }
