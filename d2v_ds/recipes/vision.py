"""Vision: data2vec 2.0 and 1.0."""

from __future__ import annotations

from typing import Any


def vision_base() -> dict[str, Any]:
    """data2vec 2.0 ViT-B/16 on ImageNet-1k: 88 M parameters, 256 images per step."""
    # fairseq v2/base_images_only_task.yaml, unless a comment states otherwise. The steps are 75
    # epochs of ImageNet's 1.28 M images; the paper's 150 epochs are the same steps with 512 images.
    return {
        "run": {"steps": 375_300},
        "batch": {"size": 256.0, "micro_batches": 16},  # 16 GPUs x 16 images
        "model": {
            "dim": 768,
            "depth": 10,
            "heads": 12,
            "mlp_ratio": 4.0,
            "norm_eps": 1e-6,
            "dropout": 0.0,
            "attention_dropout": 0.0,
            "activation_dropout": 0.0,
            "layer_drop": 0.0,
        },
        "target": {"top_k": 10, "layer_norm": "instance", "final_norm": "layer", "source": "ffn"},
        "modality": {
            "vision": {
                "views": 16,
                "shared": [],  # ema_local_encoder: true
                "image_size": 224,
                "patch_size": 16,
                "positions": "sincos",
                "extra_tokens": 1,
                "prenet_depth": 2,
                "prenet_dropout": 0.0,
                "crop_scale": [0.2, 1.0],  # fairseq data/mae_image_dataset.py
                "mask": {"prob": 0.8, "length": 3, "adjust": 0.07, "inverse": True},
                "decoder": {"dim": 768, "depth": 6, "kernel": 3, "groups": 16, "dropout": 0.0},
                "cls_weight": 0.01,
                "cls_views": 256,  # 16 images x 16 views per GPU
            }
        },
        "teacher": {"decay": 0.9998, "decay_end": 0.99999, "anneal_steps": 100_000},
        "optim": {
            "lr": 1e-3,
            "betas": [0.9, 0.95],
            "eps": 1e-8,
            "weight_decay": 0.05,
            "clip": 4.0,
            "warmup_steps": 50_040,
            "schedule": "cosine",
        },
    }


def vision_large() -> dict[str, Any]:
    """data2vec 2.0 ViT-L/16 on ImageNet-1k: 309 M parameters, 128 images per step."""
    raw = vision_base()  # fairseq v2/large_images_only_task.yaml: the differences from base
    raw["batch"] = {"size": 128.0, "micro_batches": 16}  # 16 GPUs x 8 images
    raw["model"] |= {"dim": 1024, "depth": 24, "heads": 16}
    raw["target"]["top_k"] = 18
    vision = raw["modality"]["vision"]
    vision |= {"prenet_depth": 0, "cls_views": 128}  # 8 images x 16 views
    vision["mask"] |= {"prob": 0.75, "adjust": 0.1}
    vision["decoder"] |= {"dim": 1024, "depth": 3, "kernel": 5}
    raw["teacher"]["anneal_steps"] = 150_000
    raw["optim"]["lr"] = 4e-4
    return raw


def vision_huge16() -> dict[str, Any]:
    """data2vec 2.0 ViT-H/16 on ImageNet-1k: 637 M parameters, 128 images per step."""
    raw = vision_large()  # fairseq v2/huge_images_only_task.yaml: the differences from large
    raw["model"] |= {"dim": 1280, "depth": 32}
    raw["target"]["top_k"] = 24
    raw["teacher"]["decay_end"] = 0.99995
    return raw


def vision_huge() -> dict[str, Any]:
    """data2vec 2.0 ViT-H/14 on ImageNet-1k: 637 M parameters, 256 images per step."""
    raw = vision_huge16()  # fairseq v2/huge_images14_only_task.yaml: the differences from huge16
    raw["run"]["steps"] = 500_000
    raw["batch"] = {"size": 256.0, "micro_batches": 32}  # 32 GPUs x 8 images
    raw["modality"]["vision"]["patch_size"] = 14
    raw["teacher"] = {"decay": 0.9998, "decay_end": 1.0, "anneal_steps": 300_000}
    return raw


def vision_tiny() -> dict[str, Any]:
    """data2vec 2.0 for a laptop: 0.8 M parameters, 32-pixel images, two minutes on a CPU."""
    # Not published: tuned on CIFAR-10.
    return {
        "run": {"steps": 450},
        "data": {"workers": 1},
        "batch": {"size": 32.0, "micro_batches": 4},
        "model": {
            "dim": 128,
            "depth": 4,
            "heads": 4,
            "mlp_ratio": 4.0,
            "norm_eps": 1e-6,
            "dropout": 0.0,
            "attention_dropout": 0.0,
        },
        "target": {"top_k": 4, "layer_norm": "instance", "final_norm": "layer", "source": "ffn"},
        "modality": {
            "vision": {
                "views": 4,
                "image_size": 32,
                "patch_size": 4,
                "crop_scale": [0.36, 1.0],
                "mask": {"prob": 0.75, "length": 2, "adjust": 0.1, "inverse": True},
                "decoder": {
                    "dim": 128,
                    "depth": 3,
                    "kernel": 3,
                    "groups": 16,
                    "dropout": 0.0,
                    "zero_last": True,
                },
            }
        },
        "teacher": {"decay": 0.99, "decay_end": 0.9995, "anneal_steps": 338},
        "optim": {
            "lr": 2e-3,
            "betas": [0.9, 0.95],
            "eps": 1e-8,
            "weight_decay": 0.05,
            "clip": 4.0,
            "warmup_steps": 68,
            "schedule": "cosine",
        },
        "log": {"every": 10, "pictures_every": 100},
        "save": {"every": 100, "keep": 3},
    }


def vision_base_v1() -> dict[str, Any]:
    """data2vec 1.0 ViT-B/16 on ImageNet-1k: 86 M parameters, 2,048 images per step."""
    # data2vec_vision beit/README.md and the defaults of beit/run_cyclical.py, unless a comment
    # states otherwise. The paper has 40 epochs of warm-up and drop_path 0.2.
    return {
        "run": {"steps": 500_000},  # 800 epochs of 625
        "batch": {"size": 2048.0, "micro_batches": 16},  # 16 GPUs x 128 images
        "model": {
            "dim": 768,
            "depth": 12,
            "heads": 12,
            "mlp_ratio": 4.0,
            "norm": "pre",
            "norm_eps": 1e-6,
            "qkv_bias": "qv",
            "layer_scale": 1e-4,
            "dropout": 0.0,
            "attention_dropout": 0.05,
            "drop_path": 0.25,
            "init": "beit",
        },
        # --layer_results end, --post_target_layer_norm; layer norm of each layer is the default
        "target": {"top_k": 6, "layer_norm": "layer", "final_norm": "layer", "source": "block"},
        "modality": {
            "vision": {
                "views": 1,
                "masked": "replaced",
                "shared": [],
                "image_size": 224,
                "patch_size": 16,
                "positions": "relative",
                "extra_tokens": 1,
                "crop_scale": [0.08, 1.0],
                "jitter": 0.4,
                "mask": {"kind": "beit", "patches": 120, "min_patches": 16, "max_patches": 196},
                "head": {"layers": 1},
                "loss_beta": 2.0,
                "loss_scale": 1 / 768,  # a mean over channels
            }
        },
        "teacher": {"decay": 0.9998, "decay_end": 0.9998, "anneal_steps": 0},  # --ema_start_at 0
        "optim": {
            "lr": 2e-3,
            "lr_end": 1e-5,
            "betas": [0.9, 0.999],
            "eps": 1e-8,
            "weight_decay": 0.05,
            "clip": 3.0,
            "warmup_steps": 6_250,  # 10 epochs
            "schedule": "cosine_beit",
            "decay_all": False,
            "adam_eps": "torch",
        },
    }


def vision_large_v1() -> dict[str, Any]:
    """data2vec 1.0 ViT-L/16 on ImageNet-1k: 304 M parameters, 4,096 images per step."""
    # data2vec_vision beit/README.md: the differences from base. This is the first of two runs;
    # vision_large_v1_second is the other. The paper has batches of 8,192.
    raw = vision_base_v1()
    raw["run"]["steps"] = 249_600  # 800 epochs of 312
    raw["batch"] = {"size": 4096.0, "micro_batches": 64}  # 64 GPUs x 64 images
    raw["model"] |= {
        "dim": 1024,
        "depth": 24,
        "heads": 16,
        "layer_scale": 1e-5,
        "attention_dropout": 0.15,
        "drop_path": 0.2,
    }
    raw["modality"]["vision"]["loss_scale"] = 1 / 1024
    raw["optim"] |= {"lr": 1e-3, "warmup_steps": 24_960}  # 80 epochs
    return raw


def vision_large_v1_second() -> dict[str, Any]:
    """data2vec 1.0 ViT-L/16, second run: starts from the student of vision_large_v1."""
    # data2vec_vision beit/README.md: --seed_model with the first run's student, 800 further epochs
    # with a schedule of their own
    raw = vision_large_v1()
    raw["init"] = "runs/vision_large_v1"  # the default run.dir of the first run
    raw["teacher"] = {"decay": 0.9999, "decay_end": 0.9999, "anneal_steps": 0}
    raw["optim"]["warmup_steps"] = 12_480  # 40 epochs
    return raw


def vision_tiny_v1() -> dict[str, Any]:
    """data2vec 1.0 for a laptop: 0.8 M parameters on 32-pixel images."""
    # Not published: vision_base_v1 at the size of vision_tiny.
    raw, published = vision_tiny(), vision_base_v1()
    raw["model"] |= {
        "norm": "pre",
        "qkv_bias": "qv",
        "layer_scale": 0.1,
        "init": "beit",
    }
    raw["target"] = published["target"] | {"top_k": 2}
    vision = published["modality"]["vision"]
    vision |= {"image_size": 32, "patch_size": 4, "crop_scale": [0.36, 1.0], "jitter": 0.0}
    vision["mask"] = {"kind": "beit", "patches": 39, "min_patches": 4}  # 61 % of 64
    vision |= {"head": {"layers": 1, "zero_last": True}, "loss_scale": 1 / 128}
    raw["modality"] = {"vision": vision}
    raw["optim"] |= {"betas": [0.9, 0.999], "clip": 3.0, "lr_end": 1e-5}
    return raw
