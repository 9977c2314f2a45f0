"""Reads a golden fixture (tests/golden/README.md): the task, the batch and the expected arrays."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from d2v_ds.batch import Batch, mask_indices
from d2v_ds.config import Config
from d2v_ds.decoding import decode
from d2v_ds.key_maps import FAIRSEQ_V2_SPEECH, to_ours
from d2v_ds.pretrain import Pretrain, build_pretrain

FOLDER = Path(os.environ.get("D2V_GOLDEN", Path(__file__).parent / "golden"))


def fixture_names() -> list[str]:
    return sorted(p.stem for p in FOLDER.glob("v*.npz") if not p.stem.endswith("_traj"))


@dataclass
class Fixture:
    name: str

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
        """Arrays below `prefix`/, by the rest of their names."""
        return {
            key.removeprefix(prefix + "/"): value
            for key, value in self.arrays.items()
            if key.startswith(prefix + "/")
        }

    def ours(self, prefix: str) -> dict[str, Tensor]:
        """Arrays below `prefix`/ under our parameter names, as in a Student."""
        return to_ours(self.group(prefix), FAIRSEQ_V2_SPEECH)

    def config(self) -> Config:
        resolved, adam = self.meta["resolved"], self.meta["adam"]
        return decode(
            Config,
            {
                **speech_settings(resolved),
                "run": {"steps": 10},
                "engine": {"config": "local", "precision": "fp32"},
                "teacher": {"decay": self.meta["ema_tau"], "decay_end": self.meta["ema_tau"]},
                "optim": {
                    "lr": adam["lr"],
                    "betas": adam["betas"],
                    "eps": adam["eps"],
                    "weight_decay": adam["weight_decay"],
                    "clip": self.meta["clip_norm"],
                    "warmup_steps": 0,
                    "decay_all": True,
                    "adam_eps": "fairseq",
                },
            },
        )

    def task(self) -> Pretrain:
        """Our task with the fixture's weights."""
        task = build_pretrain(self.config())
        task.student.load_state_dict(self.ours("student"), strict=True)
        teacher = {k.removeprefix("encoder."): v for k, v in self.ours("teacher").items()}
        task.teacher.encoder.load_state_dict(teacher, strict=True)
        return task.train()

    def batch(self) -> Batch:
        mask = self.arrays["mask"].numpy()
        views = self.meta["resolved"]["clone_batch"]
        masks = list(mask.reshape(-1, views, mask.shape[-1]))
        return Batch(
            modality="speech",
            index=0,
            inputs=self.arrays["batch/source"],
            views=views,
            **mask_indices(masks),
        )


def speech_settings(resolved: dict[str, Any]) -> dict[str, Any]:
    """fairseq's resolved model configuration as our settings (data2vec 2.0 speech)."""
    audio = resolved["modalities"]["audio"]
    decoder = audio["decoder"]
    norms = {True: "instance", False: "none"}
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
            "layer_drop": resolved["layerdrop"],
        },
        "target": {
            "top_k": resolved["average_top_k_layers"],
            "layer_norm": norms[resolved["instance_norm_target_layer"]],
            "final_norm": "layer" if resolved["layer_norm_targets"] else "none",
        },
        "modality": {
            "speech": {
                "views": resolved["clone_batch"],
                "loss_beta": resolved["loss_beta"],
                "loss_scale": resolved["loss_scale"],
                # the extractor's specification is written as Python arithmetic on lists
                "convs": eval(audio["feature_encoder_spec"], {"__builtins__": {}}),
                "positions": {
                    "depth": audio["conv_pos_depth"],
                    "kernel": max(3, audio["conv_pos_width"] // audio["conv_pos_depth"]),
                    "groups": audio["conv_pos_groups"],
                },
                "prenet_depth": audio["prenet_depth"],
                "prenet_dropout": audio["prenet_dropout"],
                "prenet_layer_drop": audio["prenet_layerdrop"],
                "mask": {"prob": audio["mask_prob"], "length": audio["mask_length"]},
                "decoder": {
                    "dim": decoder["decoder_dim"],
                    "depth": decoder["decoder_layers"],
                    "kernel": decoder["decoder_kernel"],
                    "groups": decoder["decoder_groups"],
                    "dropout": decoder["input_dropout"],
                    "residual": decoder["decoder_residual"],
                    "noise": audio["mask_noise_std"],
                },
            }
        },
    }
