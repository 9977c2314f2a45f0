"""Text: data2vec 2.0 and 1.0."""

from __future__ import annotations

from typing import Any

# GPT-2's byte-pair vocabulary in fairseq's order: <s> 0, <pad> 1, </s> 2, <unk> 3, <mask> last
VOCABULARY = {"vocab_size": 50_265, "pad_id": 1, "mask_id": 50_264, "specials": 4}


def text_base() -> dict[str, Any]:
    """data2vec 2.0 base on books and Wikipedia: 153 M parameters, 32,768 tokens per step."""
    # fairseq v2/base_text_only_task.yaml, unless a comment states otherwise
    return {
        "run": {"steps": 1_000_000},
        "batch": {"size": 32_768.0, "micro_batches": 16},  # 16 GPUs x 4 blocks of 512
        "model": {
            "dim": 768,
            "depth": 12,
            "heads": 12,
            "mlp_ratio": 4.0,
            "norm_eps": 1e-5,
            "dropout": 0.1,
            "attention_dropout": 0.1,
            "activation_dropout": 0.0,
            "layer_drop": 0.0,
        },
        "target": {"top_k": 12, "layer_norm": "instance", "final_norm": "none", "source": "ffn"},
        "modality": {
            "text": {
                **VOCABULARY,
                "max_tokens": 512,
                "views": 8,
                "shared": ["features"],  # ema_encoder_only: true
                "dropout": 0.1,
                "mask": {"kind": "uniform", "prob": 0.48},
                "decoder": {
                    "dim": 768,
                    "depth": 5,
                    "kernel": 9,
                    "groups": 1,
                    "dropout": 0.1,
                    "residual": False,
                    "projection": 2,
                },
                "loss_beta": 0.0,
                "loss_scale": 1.0,
            }
        },
        "teacher": {"decay": 0.9999, "decay_end": 0.99999, "anneal_steps": 100_000},
        "optim": {
            "lr": 2e-4,
            "betas": [0.9, 0.98],
            "eps": 1e-6,
            "weight_decay": 0.01,
            "clip": 1.0,
            "warmup_steps": 4_000,
            "schedule": "cosine",
        },
    }


def text_large() -> dict[str, Any]:
    """data2vec 2.0 large on books and Wikipedia: 385 M parameters, 32,768 tokens per step."""
    raw = text_base()  # fairseq v2/large_text_only_task.yaml: the differences from base
    raw["run"]["steps"] = 600_000
    raw["batch"]["micro_batches"] = 32  # 32 GPUs x 2 blocks of 512
    raw["model"] |= {"dim": 1024, "depth": 24, "heads": 16}
    raw["target"] |= {"top_k": 24, "layer_norm": "layer", "final_norm": "instance"}
    raw["modality"]["text"]["mask"]["prob"] = 0.5
    raw["optim"]["lr"] = 1e-4
    return raw


def text_tiny() -> dict[str, Any]:
    """data2vec 2.0 for a laptop: 1.4 M parameters, blocks of 128 tokens of a small vocabulary."""
    # Not published: text_base at the size of the other tiny recipes. Two settings keep the targets
    # from encoding only positions: a small position_std, and embeddings that the teacher averages.
    raw = text_base()
    raw["run"]["steps"] = 400
    raw["data"] = {"workers": 1}
    raw["batch"] = {"size": 2048.0, "micro_batches": 4}  # 16 blocks
    raw["model"] |= {"dim": 128, "depth": 4, "heads": 4, "dropout": 0.0, "attention_dropout": 0.0}
    raw["target"]["top_k"] = 4
    text = raw["modality"]["text"]
    text |= {"vocab_size": 4096, "mask_id": 4095, "max_tokens": 128, "dropout": 0.0}
    text |= {"views": 2, "shared": [], "position_std": 0.001}
    text["decoder"] |= {"dim": 128, "depth": 3, "groups": 16, "dropout": 0.0, "zero_last": True}
    raw["teacher"] = {"decay": 0.99, "decay_end": 0.9995, "anneal_steps": 300}
    raw["optim"] |= {"lr": 1e-3, "warmup_steps": 40}
    raw["log"] = {"every": 10, "pictures_every": 100}
    raw["save"] = {"every": 100, "keep": 3}
    return raw


def text_base_v1() -> dict[str, Any]:
    """data2vec 1.0 base on books and Wikipedia: 126 M parameters, 131,072 tokens per step."""
    # fairseq text/pretraining/base.yaml, unless a comment states otherwise. The paper anneals the
    # teacher over 100,000 steps, and has a variant that masks 15 % single tokens, 80/10/10:
    # mask={prob: 0.15, length: 1, random_prob: 0.1, keep_prob: 0.1}.
    raw = text_base()
    raw["batch"] = {"size": 131_072.0, "micro_batches": 16}  # 16 GPUs x 8,192 tokens
    raw["target"] = {"top_k": 10, "layer_norm": "layer", "final_norm": "none", "source": "ffn"}
    raw["modality"] = {
        "text": {
            **VOCABULARY,
            "max_tokens": 512,
            "views": 1,
            "masked": "replaced",
            "shared": ["features"],  # ema_transformer_layers_only: true
            "dropout": 0.1,
            "mask": {"kind": "spans", "prob": 0.35, "length": 4},
            "head": {"layers": 2},
            "loss_beta": 4.0,
            "loss_scale": 1.0,
        }
    }
    raw["teacher"] = {"decay": 0.999, "decay_end": 0.9999, "anneal_steps": 300_000}
    raw["optim"] |= {"clip": 5.0, "warmup_steps": 10_000}
    return raw


def text_tiny_v1() -> dict[str, Any]:
    """data2vec 1.0 for a laptop: 1.4 M parameters, blocks of 128 tokens of a small vocabulary."""
    # Not published: text_base_v1 at the size of text_tiny, except for single masked tokens and
    # targets normalised over the block, which give the targets a higher effective rank.
    raw, published = text_tiny(), text_base_v1()
    text = published["modality"]["text"]
    text |= {"vocab_size": 4096, "mask_id": 4095, "max_tokens": 128, "dropout": 0.0}
    text |= {"shared": [], "position_std": 0.001}
    text["mask"]["length"] = 1
    text["head"]["zero_last"] = True
    raw["modality"] = {"text": text}
    raw["target"] = published["target"] | {"top_k": 4, "layer_norm": "instance"}
    raw["optim"]["clip"] = 5.0
    return raw
