"""data2vec 1.0 of one modality as the classes of transformers: Data2VecAudio*, Data2VecVision* and
Data2VecText*.

    settings --stock_problems--> what the classes cannot express
    Exported --stock_folder--> config.json, tensors with their names (key_maps.py)

The fields of their configurations that have no counterpart here keep their defaults.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from d2v_ds.export.heads import head_kind
from d2v_ds.export.model import Exported
from d2v_ds.finetune.heads import NORM_EPS
from d2v_ds.key_maps import HUGGING_FACE, HUGGING_FACE_HEADS, fill, match, to_theirs
from d2v_ds.weights.transformers_folder import PREFIXES

Settings = dict[str, Any]

# The settings that the classes imply. model.* are those of the trunk, the others of the modality.
IMPLIED: dict[str, Settings] = {
    "speech": {
        "model.norm": "post",
        "model.norm_eps": 1e-5,
        "model.qkv_bias": "all",
        "model.layer_scale": 0.0,
        "alibi": False,
    },
    "vision": {"model.norm": "pre", "model.qkv_bias": "qv", "positions": "relative"},
    "text": {"model.norm": "post", "model.qkv_bias": "all", "model.layer_scale": 0.0},
}
EXTRA_TOKENS = {"speech": 0, "vision": 1, "text": 0}
BASE = {"speech": "Data2VecAudio", "vision": "Data2VecVision", "text": "Data2VecText"}
HEADS = {  # modality -> (kind of the head, class with it)
    "speech": ("ctc", "ForCTC"),
    "vision": ("mean", "ForImageClassification"),
    "text": ("first", "ForSequenceClassification"),
}


def stock_problems(exported: Exported) -> list[str]:
    """The settings that the classes of transformers cannot express; empty if they can."""
    if len(exported.modality) > 1:
        return ["several modalities"]
    [(name, settings)] = exported.modality.items()
    model = exported.model
    implied = {
        "masked": "replaced",
        **IMPLIED[name],
        "prenet_depth": 0,
        "extra_tokens": EXTRA_TOKENS[name],
    }
    problems = []
    for key, value in implied.items():
        found = model[key[6:]] if key.startswith("model.") else settings[key]
        if found != value:
            path = key if key.startswith("model.") else f"modality.{name}.{key}"
            problems.append(f"{path}={found}")
    if name == "vision" and model["layer_scale"] <= 0:
        problems.append("model.layer_scale=0")
    if exported.head and head_kind(exported.head) != HEADS[name][0]:
        problems.append(f"a head of the kind {head_kind(exported.head)} for {name}")
    if exported.head and name == "vision" and model["norm_eps"] != NORM_EPS:
        problems.append(f"model.norm_eps={model['norm_eps']}, unlike that of the head")
    return problems


def stock_config(exported: Exported) -> Settings:
    """config.json for the classes of transformers."""
    name = exported.names[0]
    suffix = HEADS[name][1] if exported.head else "Model"
    fields = {"speech": speech_fields, "vision": vision_fields, "text": text_fields}[name]
    return {
        "architectures": [BASE[name] + suffix],
        "model_type": BASE[name].replace("Data2Vec", "data2vec-").lower(),
        "hidden_size": exported.model["dim"],
        "num_hidden_layers": exported.model["depth"],
        "num_attention_heads": exported.model["heads"],
        "intermediate_size": int(exported.model["dim"] * exported.model["mlp_ratio"]),
        "hidden_act": "gelu",
        "layer_norm_eps": exported.model["norm_eps"],
        **fields(exported, exported.modality[name]),
    }


def speech_fields(exported: Exported, settings: Settings) -> Settings:
    model, finetune = exported.model, exported.finetune
    channels, kernels, strides = zip(*settings["convs"], strict=True)
    positions = settings["positions"]
    return {
        "conv_dim": channels,
        "conv_kernel": kernels,
        "conv_stride": strides,
        "conv_bias": False,
        "num_feat_extract_layers": len(channels),
        "num_conv_pos_embeddings": positions["depth"],
        "conv_pos_kernel_size": positions["kernel"],
        "num_conv_pos_embedding_groups": positions["groups"],
        "hidden_dropout": model["dropout"],
        "attention_dropout": model["attention_dropout"],
        "activation_dropout": model["activation_dropout"],
        "feat_proj_dropout": 0.0,
        "final_dropout": finetune.get("head_dropout", 0.0),
        "layerdrop": model["layer_drop"],
        # The model has a mask token only if this is above 0.
        "mask_time_prob": finetune.get("time_mask") or 0.05,
        "mask_time_length": finetune.get("time_mask_length", 10),
        "mask_feature_prob": finetune.get("channel_mask", 0.0),
        "mask_feature_length": finetune.get("channel_mask_length", 64),
        "ctc_loss_reduction": "mean",
        "ctc_zero_infinity": True,
        # The blank of CTC is padding.
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": None,
        **({"vocab_size": len(finetune["labels"])} if exported.head else {}),
    }


def vision_fields(exported: Exported, settings: Settings) -> Settings:
    model = exported.model
    return {
        "image_size": settings["image_size"],
        "patch_size": settings["patch_size"],
        "num_channels": 3,
        "use_mask_token": True,
        "use_absolute_position_embeddings": False,
        "use_relative_position_bias": False,
        "use_shared_relative_position_bias": True,
        # Without: the class token, and the norm of the trunk; with: the norm of the head.
        "use_mean_pooling": bool(exported.head),
        "layer_scale_init_value": model["layer_scale"],
        "hidden_dropout_prob": model["dropout"],
        "attention_probs_dropout_prob": model["attention_dropout"],
        "drop_path_rate": model["drop_path"],
    }


def text_fields(exported: Exported, settings: Settings) -> Settings:
    model, special = exported.model, exported.special_ids
    return {
        "vocab_size": settings["vocab_size"],
        "max_position_embeddings": settings["max_tokens"] + settings["pad_id"] + 1,
        "type_vocab_size": 1,
        "pad_token_id": settings["pad_id"],
        "bos_token_id": special.get("bos"),
        "eos_token_id": special.get("eos"),
        "hidden_dropout_prob": model["dropout"],
        "attention_probs_dropout_prob": model["attention_dropout"],
        "classifier_dropout": exported.finetune.get("head_dropout", 0.0),
    }


def stock_tensors(exported: Exported) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(the tensors of their class, by their names; tensors of ours that it lacks, by our names)."""
    name = exported.names[0]
    theirs = to_theirs(exported.encoder, HUGGING_FACE[name, "1.0"])
    if not exported.head:
        return theirs, {}
    lacking = {}
    if name == "vision":  # ForImageClassification has no norm after the trunk
        lacking = {k: v for k, v in exported.encoder.items() if ".trunk.norm." in k}
        theirs = {k: v for k, v in theirs.items() if not k.startswith("layernorm.")}
    theirs = {PREFIXES[name] + key: tensor for key, tensor in theirs.items()}
    for key, tensor in exported.head.items():
        rule, _, values = match(key, HUGGING_FACE_HEADS[name], side="ours")
        theirs[fill(rule.names[0], values)] = tensor
    return theirs, lacking
