"""Speech: data2vec 2.0 and 1.0."""

from __future__ import annotations

from typing import Any


def speech_base() -> dict[str, Any]:
    """data2vec 2.0 base on LibriSpeech 960 h: 94 M parameters, 500 s of audio per step."""
    # fairseq v2/base_audio_only_task.yaml, unless a comment states otherwise
    return {
        "run": {"steps": 400_000},
        "batch": {"size": 500.0, "micro_batches": 8},  # 8 GPUs x 1.0 M samples of 16 kHz
        "model": {
            "dim": 768,
            "depth": 12,
            "heads": 12,
            "mlp_ratio": 4.0,
            "norm_eps": 1e-5,
            "dropout": 0.1,
            "attention_dropout": 0.1,
            "activation_dropout": 0.0,
            "layer_drop": 0.05,
        },
        "target": {"top_k": 8, "layer_norm": "instance", "final_norm": "none", "source": "ffn"},
        "modality": {
            "speech": {
                "views": 8,
                "shared": ["features"],  # ema_local_encoder: false
                "crop_seconds": 20.0,
                "min_seconds": 2.0,
                "positions": {"depth": 5, "kernel": 19, "groups": 16},  # width 95 over 5 layers
                "prenet_depth": 0,
                "prenet_dropout": 0.1,
                "prenet_layer_drop": 0.05,
                "mask": {"prob": 0.5, "length": 5, "adjust": 0.05, "inverse": False},
                "decoder": {"dim": 384, "depth": 4, "kernel": 7, "groups": 16, "dropout": 0.1},
            }
        },
        "teacher": {"decay": 0.999, "decay_end": 0.99999, "anneal_steps": 75_000},
        "optim": {
            "lr": 7.5e-4,
            "betas": [0.9, 0.98],
            "eps": 1e-6,
            "weight_decay": 0.01,
            "clip": 0.0,
            "warmup_steps": 8_000,
            "schedule": "cosine",
        },
    }


def speech_large() -> dict[str, Any]:
    """data2vec 2.0 large on Libri-light 60 kh: 315 M parameters, 960 s of audio per step."""
    raw = speech_base()  # fairseq v2/large_audio_only_task.yaml: the differences from base
    raw["run"]["steps"] = 600_000
    raw["batch"] = {"size": 960.0, "micro_batches": 48}  # 48 GPUs x 320 k samples of 16 kHz
    raw["model"] |= {"dim": 1024, "depth": 16, "heads": 16, "layer_drop": 0.0}
    raw["target"]["top_k"] = 16
    speech = raw["modality"]["speech"]
    speech |= {"views": 12, "prenet_depth": 8, "prenet_layer_drop": 0.0}
    speech["mask"] |= {"prob": 0.55, "adjust": 0.1}
    speech["decoder"]["dim"] = 768
    raw["teacher"] = {"decay": 0.9997, "decay_end": 1.0, "anneal_steps": 300_000}
    raw["optim"] |= {"lr": 4e-4, "clip": 1.0, "warmup_steps": 10_000}
    return raw


def speech_tiny() -> dict[str, Any]:
    """data2vec 2.0 for a laptop: 1 M parameters, trains in about two minutes on a CPU."""
    # Not published: tuned on the Free Spoken Digit Dataset. Three settings matter most: a decoder
    # initialised with zeros, positions that cover much less than a crop, and eight views.
    return {
        "run": {"steps": 400},
        "data": {"workers": 1},
        "batch": {"size": 8.05, "micro_batches": 4},  # 4 crops
        "model": {
            "dim": 128,
            "depth": 4,
            "heads": 4,
            "mlp_ratio": 4.0,
            "dropout": 0.0,
            "attention_dropout": 0.0,
        },
        "target": {"top_k": 4, "layer_norm": "instance", "final_norm": "none", "source": "ffn"},
        "modality": {
            "speech": {
                "views": 8,
                "shared": ["features"],
                "crop_seconds": 2.005,  # 100 frames; with shorter crops, runs can collapse
                "min_seconds": 0.5,
                "convs": [[32, 10, 5], [32, 3, 2], [64, 3, 2], [64, 3, 2], [128, 3, 2]]
                + [[128, 2, 2]] * 2,
                "positions": {"depth": 3, "kernel": 9, "groups": 16},
                "prenet_dropout": 0.0,
                "mask": {"prob": 0.5, "length": 5, "adjust": 0.05},
                "decoder": {
                    "dim": 128,
                    "depth": 4,
                    "kernel": 7,
                    "groups": 16,
                    "dropout": 0.0,
                    "zero_last": True,
                },
            }
        },
        "teacher": {"decay": 0.99, "decay_end": 0.9995, "anneal_steps": 300},
        "optim": {
            "lr": 1e-3,
            "betas": [0.9, 0.98],
            "eps": 1e-6,
            "weight_decay": 0.01,
            "clip": 1.0,
            "warmup_steps": 40,
            "schedule": "cosine",
        },
        "log": {"every": 10, "pictures_every": 100},
        "save": {"every": 100, "keep": 3},
    }


def speech_base_v1() -> dict[str, Any]:
    """data2vec 1.0 base on LibriSpeech 960 h: 94 M parameters, 63 minutes of audio per step."""
    # fairseq audio/pretraining/base_librispeech.yaml, unless a comment states otherwise
    raw = speech_base()
    raw["batch"] = {"size": 3800.0, "micro_batches": 16}  # 16 GPUs x 3.8 M samples of 16 kHz
    speech = raw["modality"]["speech"]
    del speech["decoder"], speech["prenet_layer_drop"]
    speech |= {
        "views": 1,
        "masked": "replaced",
        # ema_layers_only: true; the published checkpoint averages the positions as well
        "shared": ["features", "positions"],
        "alibi": False,
        "mask": {"kind": "spans", "prob": 0.65, "length": 10},
        "head": {"layers": 1},
    }
    raw["teacher"] = {"decay": 0.999, "decay_end": 0.9999, "anneal_steps": 30_000}
    raw["optim"] |= {"lr": 5e-4, "warmup_steps": 12_000, "schedule": "tri_stage"}  # 3 % of steps
    return raw


def speech_tiny_v1() -> dict[str, Any]:
    """data2vec 1.0 for a laptop: 1 M parameters."""
    # Not published: speech_base_v1 at the size of speech_tiny.
    raw = speech_tiny()
    speech = raw["modality"]["speech"]
    del speech["decoder"]
    speech |= {
        "views": 1,
        "masked": "replaced",
        "shared": ["features", "positions"],
        "alibi": False,
        "mask": {"kind": "spans", "prob": 0.65, "length": 10},
        "head": {"layers": 1, "zero_last": True},
    }
    return raw
