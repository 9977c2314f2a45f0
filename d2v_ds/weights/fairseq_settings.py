"""The configurations of fairseq and BEiT in our terms.

Paths of theirs are below `cfg` in a fairseq checkpoint and among `args` in a BEiT checkpoint. NAME
stands for the modality in our paths, {} for the section of the modality in theirs. Sizes that
follow from the shapes of tensors are not in the tables.
"""

from __future__ import annotations

import ast
from typing import Any

from d2v_ds.config.decoding import value_at
from d2v_ds.config.documents import shown
from d2v_ds.errors import UserError
from d2v_ds.weights.tables import Settings, Table, given, take

RATE = 16_000  # Hz, of all published speech models


def seconds(samples: float) -> float:
    """As a setting has it: fairseq writes the largest integer for "no limit"."""
    return min(samples / RATE, 1e5)


def convolutions(text: Any) -> list[list[int]]:
    """[[channels, kernel, stride], ...] of a specification such as [(512, 10, 5)] + [(512, 3, 2)]
    * 4, which is read without being evaluated. Raises ValueError."""

    def read(node: ast.AST) -> Any:
        if isinstance(node, ast.Constant) and type(node.value) is int:
            return node.value
        if isinstance(node, ast.List | ast.Tuple):
            return [read(item) for item in node.elts]
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return read(node.left) + read(node.right)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            items, times = read(node.left), read(node.right)
            if isinstance(items, list) and isinstance(times, int):
                if 0 < times and len(items) * times <= MOST:
                    return items * times
        raise ValueError("neither a number nor a list")

    try:
        found = read(ast.parse(str(text)[:LONGEST], mode="eval").body)
    except (SyntaxError, TypeError, ValueError, RecursionError, MemoryError):  # of a deep nesting
        raise ValueError(f"{shown(text)} is no list of convolutions") from None
    if not isinstance(found, list) or not all(
        isinstance(item, list) and len(item) == 3 for item in found
    ):
        raise ValueError(f"{shown(text)} is no list of convolutions")
    return found


MOST = 100  # convolutions
LONGEST = 10_000  # characters

SPEECH_DATA: Table = {
    "modality.speech.sample_rate": "task.sample_rate",
    "modality.speech.crop_seconds": ("task.max_sample_size", seconds),
    "modality.speech.min_seconds": ("task.min_sample_size", seconds),
}

SPEECH_V1: Table = {
    "model.heads": "model.encoder_attention_heads",
    "model.dropout": "model.dropout",
    "model.attention_dropout": "model.attention_dropout",
    "model.activation_dropout": "model.activation_dropout",
    "model.layer_drop": "model.encoder_layerdrop",
    "modality.speech.prenet_dropout": "model.dropout",
    "modality.speech.convs": ("model.conv_feature_layers", convolutions),
    "modality.speech.mask.prob": "model.mask_prob",
    "modality.speech.mask.length": "model.mask_length",
    "modality.speech.loss_beta": "model.loss_beta",
    "modality.speech.loss_scale": "model.loss_scale",
    **SPEECH_DATA,
}

TEXT_V1: Table = {
    "model.heads": "model.transformer.encoder.attention_heads",
    "model.dropout": "model.transformer.dropout",
    "model.attention_dropout": "model.transformer.attention_dropout",
    "model.activation_dropout": "model.transformer.activation_dropout",
    "model.layer_drop": "model.transformer.encoder.layerdrop",
    "modality.text.dropout": "model.transformer.dropout",
    "modality.text.mask.prob": "task.mask_prob",
    "modality.text.mask.length": "task.mask_multiple_length",
    "modality.text.mask.random_prob": "task.random_token_prob",
    "modality.text.mask.keep_prob": "task.leave_unmasked_prob",
    "modality.text.loss_beta": "model.loss_beta",
    "modality.text.loss_scale": "model.loss_scale",
}

BEIT: Table = {
    "model.layer_scale": "layer_scale_init_value",
    "model.attention_dropout": "attn_drop_rate",
    "model.drop_path": "drop_path",
    "modality.vision.mask.patches": "num_mask_patches",
    "modality.vision.mask.min_patches": "min_mask_patches_per_block",
    "modality.vision.mask.max_patches": "max_mask_patches_per_block",
    "modality.vision.loss_beta": "l1_beta",
    "modality.vision.jitter": "color_jitter",
}

COMMON_V2: Table = {
    "model.heads": "model.num_heads",
    "model.norm_eps": "model.norm_eps",
    "model.dropout": "model.encoder_dropout",
    "model.attention_dropout": "model.attention_dropout",
    "model.activation_dropout": "model.activation_dropout",
    "model.drop_path": "model.end_drop_path_rate",
    "model.layer_drop": "model.layerdrop",
    "modality.NAME.views": "model.clone_batch",
    "modality.NAME.cls_weight": "model.cls_loss",
    "modality.NAME.loss_beta": "model.loss_beta",
    "modality.NAME.loss_scale": "model.loss_scale",
    "modality.NAME.prenet_dropout": "{}.prenet_dropout",
    "modality.NAME.prenet_layer_drop": "{}.prenet_layerdrop",
    "modality.NAME.mask.prob": "{}.mask_prob",
    "modality.NAME.decoder.dropout": "{}.decoder.input_dropout",
    "modality.NAME.decoder.residual": "{}.decoder.decoder_residual",
    "modality.NAME.decoder.noise": "{}.mask_noise_std",
}
# Sizes of the decoder, for files without its tensors.
DECODER: Table = {
    "modality.NAME.decoder.dim": "{}.decoder.decoder_dim",
    "modality.NAME.decoder.depth": "{}.decoder.decoder_layers",
    "modality.NAME.decoder.kernel": "{}.decoder.decoder_kernel",
    "modality.NAME.decoder.groups": "{}.decoder.decoder_groups",
}
BLOCK_MASKS: Table = {
    "modality.NAME.mask.length": "{}.mask_length",
    "modality.NAME.mask.adjust": "{}.mask_prob_adjust",
    "modality.NAME.mask.inverse": "{}.inverse_mask",
}
SPEECH_V2: Table = {
    "modality.speech.convs": ("{}.feature_encoder_spec", convolutions),
    **SPEECH_DATA,
}
TEXT_V2: Table = {"modality.text.dropout": "{}.dropout"}

TABLES: dict[tuple[str, str], list[Table]] = {
    ("speech", "1.0"): [SPEECH_V1],
    ("text", "1.0"): [TEXT_V1],
    ("vision", "1.0"): [BEIT],
    ("speech", "2.0"): [COMMON_V2, DECODER, BLOCK_MASKS, SPEECH_V2],
    ("vision", "2.0"): [COMMON_V2, DECODER, BLOCK_MASKS],
    ("text", "2.0"): [COMMON_V2, DECODER, TEXT_V2],
}
THEIRS = {"speech": "audio", "vision": "image", "text": "text"}

# Switches of the original code with one value in every published model: (path, value).
REQUIRED: dict[tuple[str, str], dict[str, Any]] = {
    ("speech", "1.0"): {
        "model.extractor_mode": "layer_norm",
        "model.layer_norm_first": False,
        "model.activation_fn": "gelu",
        "model.conv_bias": False,
    },
    ("text", "1.0"): {
        "model.transformer.encoder.normalize_before": False,
        "model.transformer.activation_fn": "gelu",
        "model.transformer.no_scale_embedding": True,
    },
    ("vision", "1.0"): {},
    ("speech", "2.0"): {
        "model.layer_norm_first": False,
        "{}.extractor_mode": "layer_norm",
        "{}.conv_pos_pre_ln": False,
        "{}.learned_alibi": False,
        "{}.alibi_max_pos": None,
    },
    ("vision", "2.0"): {
        "model.layer_norm_first": False,
        "{}.use_alibi_encoder": False,
        "{}.transformer_decoder": False,
    },
    ("text", "2.0"): {
        "model.layer_norm_first": False,
        "{}.use_alibi_encoder": False,
        "{}.no_scale_embedding": True,
    },
}


def translate(modality: str, version: str, theirs: Settings) -> Settings:
    """{"model": ..., "modality": {name: ...}} as far as the configuration `theirs` says. Raises
    UserError if it describes a model that differs from the published ones."""
    ours: Settings = {"model": {}, "modality": {modality: {}}}
    for path, required in REQUIRED[modality, version].items():
        where = located(path, modality)
        if given(theirs, where) and value_at(theirs, where) != required:
            raise UserError(
                f"{where}={value_at(theirs, where)!r} is not supported; published models have "
                f"{required!r}"
            )
    for table in TABLES[modality, version]:
        filled = {
            path.replace("NAME", modality): (
                (located(source[0], modality), source[1])
                if isinstance(source, tuple)
                else located(source, modality)
            )
            for path, source in table.items()
        }
        take(filled, theirs, ours)
    return ours


def located(path: str, modality: str) -> str:
    return path.replace("{}", f"model.modalities.{THEIRS[modality]}")


def copied_parts(modality: str, version: str, theirs: Settings) -> tuple[str, ...]:
    """The parts of the front end that fairseq's teacher has, but copies from the student."""
    if version == "1.0" and modality == "speech":
        return ("positions",) if value_at(theirs, "model.ema_layers_only") else ()
    if version == "1.0" and modality == "text":
        copied = value_at(theirs, "model.ema_transformer_layers_only")
        return ("features",) if copied else ()
    return ()
