"""Fine-tuning on ImageNet-1k, as published for data2vec 2.0 and 1.0."""

from __future__ import annotations

from typing import Any

from d2v_ds.recipes.finetuning import NO_DROPOUT, Function, named

IMAGES = 1_281_167  # of the training set


def imagenet(
    *, lr: float, steps: int, layer_decay: float, drop_path: float, lr_end: float, clip: float
) -> dict[str, Any]:
    """data2vec 2.0: 512 images per step."""
    # fairseq examples/data2vec/config/vision/finetuning/mae_imagenet_*clean.yaml and the defaults
    # of mae_image_classification.py and mae_finetuning_image_dataset.py
    return {
        "run": {"steps": steps},
        "batch": {"size": 512.0, "micro_batches": 16},  # 16 GPUs x 32 images
        "model": {**NO_DROPOUT, "drop_path": drop_path},
        "modality": {"vision": {"crop_scale": [0.08, 1.0], "jitter": 0.0}},
        "finetune": {
            "task": "classification",
            "layer_decay": layer_decay,  # of the blocks alone
            "label_smoothing": 0.1,
            "mixup": 0.7,
            "cutmix": 1.0,
            "mix_prob": 0.9,
            "mix_switch": 0.5,
            "erase": 0.25,
            "augment": "rand",
            "head_std": 0.02,
        },
        "optim": {
            "lr": lr,
            "lr_end": lr_end,
            "betas": [0.9, 0.95],
            "eps": 1e-8,
            "weight_decay": 0.05,
            "clip": clip,
            "warmup_steps": 16_000,
            "schedule": "cosine",
        },
        "valid": {"every": 2_500},  # about an epoch
        "save": {"every": 2_500, "keep": 1, "keep_best": 1},
    }


def imagenet_v1(
    *,
    lr: float,
    epochs: int,
    warmup_epochs: int,
    drop_path: float,
    weight_decay: float,
) -> dict[str, Any]:
    """data2vec 1.0: 1,024 images per step."""
    # data2vec_vision beit/README.md and the defaults of beit/run_class_finetuning.py
    epoch = IMAGES // 1_024
    return {
        "run": {"steps": epochs * epoch},
        "batch": {"size": 1024.0, "micro_batches": 8},  # 8 GPUs x 128 images
        "model": {**NO_DROPOUT, "drop_path": drop_path},
        # With RandAugment there is no colour jitter.
        "modality": {"vision": {"crop_scale": [0.08, 1.0], "jitter": 0.0}},
        "finetune": {
            "task": "classification",
            "layer_decay": 0.65,
            "layer_decay_front_end": True,
            "label_smoothing": 0.1,
            "mixup": 0.8,
            "cutmix": 1.0,
            "mix_prob": 1.0,
            "mix_switch": 0.5,
            "erase": 0.25,
            "augment": "rand",
            "head_std": 2e-5,  # 0.02 x init_scale 0.001
        },
        "optim": {
            "lr": lr,
            "lr_end": 1e-6,
            "betas": [0.9, 0.999],
            "eps": 1e-8,
            "weight_decay": weight_decay,
            "clip": 0.0,
            "warmup_steps": warmup_epochs * epoch,
            "schedule": "cosine_beit",
        },
        "valid": {"every": epoch},
        "save": {"every": epoch, "keep": 1, "keep_best": 1},
    }


LARGE = {"lr": 5e-4, "steps": 125_200, "layer_decay": 0.75, "drop_path": 0.2, "clip": 4.0}
TABLE: dict[str, dict[str, Any]] = {
    "imagenet_base": {
        "lr": 1e-3,
        "steps": 250_200,
        "layer_decay": 0.65,
        "drop_path": 0.1,
        "lr_end": 1e-6,
        "clip": 0.0,
    },
    "imagenet_large": {**LARGE, "lr_end": 1e-7},
    "imagenet_huge": {**LARGE, "lr_end": 1e-20},
}
TABLE_V1: dict[str, dict[str, Any]] = {
    "imagenet_base_v1": {
        "lr": 4e-3,
        "epochs": 100,
        "warmup_epochs": 10,  # 20 in the paper
        "drop_path": 0.2,
        "weight_decay": 0.0,
    },
    "imagenet_large_v1": {
        "lr": 5e-3,  # 4e-3 in the paper
        "epochs": 50,
        "warmup_epochs": 5,  # the paper; the README leaves it open
        "drop_path": 0.25,
        "weight_decay": 0.05,
    },
}
FUNCTIONS: list[Function] = [
    *(
        named(
            name,
            f"ImageNet-1k for {name.replace('imagenet', 'vision')}: {row['steps']:,} steps of 512 "
            "images.",
            imagenet,
            **row,
        )
        for name, row in TABLE.items()
    ),
    *(
        named(
            name,
            f"ImageNet-1k for {name.replace('imagenet', 'vision')}: {row['epochs']} epochs of "
            "1,024 images per step.",
            imagenet_v1,
            **row,
        )
        for name, row in TABLE_V1.items()
    ),
]
