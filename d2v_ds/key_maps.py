"""Weight names and layouts of other implementations <-> ours: tables and pure functions.

    their state dict --to_ours(rules)--> a Student's state dict --to_theirs(rules)--> theirs

FAIRSEQ has the pre-training models of fairseq and data2vec_vision, HUGGING_FACE the encoders of
transformers (data2vec 1.0 only), both by (modality, "1.0" or "2.0").

A rule pairs name templates: {i} and {j} stand for numbers, {i+1} for one that counts from one, {p}
for weight or bias, {rest} for anything. Tensors that they store separately but we do not (queries,
keys, values) are joined along their first dimension. D width, H heads.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rule:
    """A pair of templates. theirs: one name, or several whose tensors are joined; empty if they
    lack the tensor. ours: empty if we lack it, so that theirs is dropped. The shapes are given if
    they differ; in them 0 means D and -1 means the remaining size."""

    theirs: str | tuple[str, ...]
    ours: str
    theirs_shape: tuple[int, ...] = ()
    ours_shape: tuple[int, ...] = ()
    zeros: bool = False  # dropped on the way to us, zeros of theirs_shape on the way back

    @property
    def names(self) -> tuple[str, ...]:
        return (self.theirs,) if isinstance(self.theirs, str) else self.theirs


class Misfit(KeyError):
    """Tensors that cannot be joined. Its argument is a sentence, not only a name."""


def to_ours(state: Mapping[str, Tensor], rules: Sequence[Rule]) -> dict[str, Tensor]:
    """Their tensors with our names and shapes. Raises KeyError for an unknown name, Misfit if one
    of several tensors that are joined is missing or does not fit the others."""
    parts: dict[str, tuple[Rule, dict[str, str], dict[int, Tensor]]] = {}
    for theirs, tensor in state.items():
        rule, part, values = match(theirs, rules, side="theirs")
        if rule.ours:
            parts.setdefault(fill(rule.ours, values), (rule, values, {}))[2][part] = tensor
    result = {}
    for ours, (rule, values, found) in parts.items():
        missing = [fill(name, values) for n, name in enumerate(rule.names) if n not in found]
        if missing:
            raise Misfit(f"{ours}: {', '.join(missing)} is missing")
        pieces = [found[n] for n in sorted(found)]
        if len({piece.shape for piece in pieces}) > 1 or (len(pieces) > 1 and not pieces[0].dim()):
            raise Misfit(f"{ours}: {', '.join(str(list(p.shape)) for p in pieces)} do not fit")
        tensor = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        result[ours] = shaped(tensor, rule.ours_shape, tensor.shape[-1] if tensor.dim() else 1)
    return result


def to_theirs(state: Mapping[str, Tensor], rules: Sequence[Rule]) -> dict[str, Tensor]:
    """The tensors of a whole student or encoder with their names and shapes. Raises KeyError for an
    unknown name."""
    width = len(state[NORM])
    result: dict[str, Tensor] = {}
    for ours, tensor in state.items():
        rule, _, values = match(ours, rules, side="ours")
        names = [fill(name, values) for name in rule.names if name]
        tensor = shaped(tensor, rule.theirs_shape, width)
        result |= dict(zip(names, tensor.chunk(max(1, len(names))), strict=False))
    for rule in rules:
        if rule.zeros:
            result[rule.names[0]] = shaped(torch.zeros(width), rule.theirs_shape, width)
    return result


NORM = "encoder.trunk.blocks.0.norm1.weight"  # in every model of ours; its length is D


def shaped(tensor: Tensor, shape: tuple[int, ...], width: int) -> Tensor:
    return tensor.reshape([n or width for n in shape]) if shape else tensor


def left_out(theirs: str = "", ours: str = "") -> Rule:
    return Rule(theirs, ours)


def match(name: str, rules: Sequence[Rule], *, side: str) -> tuple[Rule, int, dict[str, str]]:
    """The rule whose template on one side matches a name, which of its parts, and the values of the
    letters, counted from zero. Raises KeyError if there is none."""
    for rule in rules:
        for part, template in enumerate(rule.names if side == "theirs" else (rule.ours,)):
            if template and (found := re.fullmatch(pattern(template), name)):
                values = found.groupdict()
                for letter in values:
                    if f"{{{letter}+1}}" in template:
                        values[letter] = str(int(values[letter]) - 1)
                return rule, part, values
    raise KeyError(name)


def is_known(name: str, rules: Sequence[Rule]) -> bool:
    """Whether a rule has a template for this name of theirs."""
    try:
        match(name, rules, side="theirs")
    except KeyError:
        return False
    return True


def named_error(error: KeyError, model: str) -> str:
    """A sentence about an error of `to_ours`. model: whose names they are."""
    text = str(error.args[0])
    return text if isinstance(error, Misfit) else f"{text}: no parameter of {model}"


GROUPS = {"p": "(?P<p>weight|bias)", "rest": "(?P<rest>.+)"}


def pattern(template: str) -> str:
    parts = re.split(r"\{(\w+)(?:\+1)?\}", template)  # literal, letter, literal, letter, ...
    return "".join(
        re.escape(part) if n % 2 == 0 else GROUPS.get(part, rf"(?P<{part}>\d+)")
        for n, part in enumerate(parts)
    )


def fill(template: str, values: Mapping[str, str]) -> str:
    for letter, value in values.items():
        template = template.replace(f"{{{letter}}}", value)
        if f"{{{letter}+1}}" in template:
            template = template.replace(f"{{{letter}+1}}", str(int(value) + 1))
    return template


# ------------------------------------------------------------------------- fairseq, data2vec 2.0

SPEECH = "encoder.front_ends.speech"
VISION = "encoder.front_ends.vision"
TEXT = "encoder.front_ends.text"


def blocks_v2(theirs: str, ours: str) -> list[Rule]:
    pairs = {
        "norm1": "norm1",
        "norm2": "norm2",
        "attn.qkv": "attention.qkv",
        "attn.proj": "attention.proj",
        "mlp.fc1": "ffn.fc1",
        "mlp.fc2": "ffn.fc2",
    }
    return [Rule(f"{theirs}.{a}.{{p}}", f"{ours}.{b}.{{p}}") for a, b in pairs.items()]


def common_v2(theirs: str, modality: str) -> list[Rule]:
    """The rules that all modalities share; theirs: AUDIO, IMAGE or TEXT of fairseq."""
    theirs, ours = f"modality_encoders.{theirs}", f"encoder.front_ends.{modality}"
    prenet = f"{ours}.context.prenet.blocks.{{i}}"
    return [
        Rule(f"{theirs}.context_encoder.norm.{{p}}", f"{ours}.context.norm.{{p}}"),
        *blocks_v2(f"{theirs}.context_encoder.blocks.{{i}}", prenet),
        Rule(f"{theirs}.extra_tokens", f"{ours}.extra.embedding", (1, -1, 0), (-1,)),
        Rule(f"{theirs}.decoder.blocks.{{i}}.0.{{p}}", f"predictors.{modality}.convs.{{i}}.{{p}}"),
        Rule(f"{theirs}.decoder.proj.{{p}}", f"predictors.{modality}.proj.{{p}}"),
        Rule(f"{theirs}.decoder.proj.{{i}}.{{p}}", f"predictors.{modality}.proj.{{i}}.{{p}}"),
        *blocks_v2("blocks.{i}", "encoder.trunk.blocks.{i}"),
        left_out("_ema"),
    ]


AUDIO, IMAGE, TOKENS = (f"modality_encoders.{name}" for name in ("AUDIO", "IMAGE", "TEXT"))

FAIRSEQ_V2_SPEECH = [
    Rule(f"{AUDIO}.alibi_scale", f"{SPEECH}.bias.scale", (1, 1, -1, 1, 1), (-1,)),
    Rule(
        f"{AUDIO}.local_encoder.conv_layers.{{i}}.0.{{p}}", f"{SPEECH}.features.convs.{{i}}.{{p}}"
    ),
    Rule(
        f"{AUDIO}.local_encoder.conv_layers.{{i}}.2.1.{{p}}", f"{SPEECH}.features.norms.{{i}}.{{p}}"
    ),
    Rule(f"{AUDIO}.project_features.1.{{p}}", f"{SPEECH}.features.norm.{{p}}"),
    Rule(f"{AUDIO}.project_features.2.{{p}}", f"{SPEECH}.features.proj.{{p}}"),
    Rule(
        f"{AUDIO}.relative_positional_encoder.{{i+1}}.0.{{p}}",
        f"{SPEECH}.positions.convs.{{i}}.{{p}}",
    ),
    *common_v2("AUDIO", "speech"),
]

FAIRSEQ_V2_VISION = [
    Rule(f"{IMAGE}.local_encoder.proj.{{p}}", f"{VISION}.features.proj.{{p}}"),
    Rule(
        f"{IMAGE}.fixed_positional_encoder.positions",
        f"{VISION}.features.positions",
        (1, -1, 0),
        (-1, 0),
    ),
    # older names of the same
    *(
        Rule(f"{IMAGE}.positional_encoder.{name}", f"{VISION}.features.positions", (), (-1, 0))
        for name in ("positions", "pos_embed")
    ),
    *common_v2("IMAGE", "vision"),
]

FAIRSEQ_V2_TEXT = [
    Rule(f"{TOKENS}.local_encoder.embed_tokens.weight", f"{TEXT}.features.tokens.weight"),
    Rule(f"{TOKENS}.local_encoder.embed_positions.weight", f"{TEXT}.features.positions.weight"),
    Rule(f"{TOKENS}.local_encoder.layernorm_embedding.{{p}}", f"{TEXT}.features.norm.{{p}}"),
    *common_v2("TEXT", "text"),
]

# ------------------------------------------------------- fairseq and data2vec_vision, data2vec 1.0


def blocks_v1(theirs: str) -> list[Rule]:
    """A post-norm block of fairseq's transformer, under `theirs`."""
    ours = "encoder.trunk.blocks.{i}"
    pairs = {
        "self_attn.out_proj": "attention.proj",
        "self_attn_layer_norm": "norm1",
        "fc1": "ffn.fc1",
        "fc2": "ffn.fc2",
        "final_layer_norm": "norm2",
    }
    return [
        Rule(
            tuple(f"{theirs}.{{i}}.self_attn.{x}_proj.{{p}}" for x in "qkv"),
            f"{ours}.attention.qkv.{{p}}",
        ),
        *(Rule(f"{theirs}.{{i}}.{a}.{{p}}", f"{ours}.{b}.{{p}}") for a, b in pairs.items()),
    ]


FAIRSEQ_V1_SPEECH = [
    Rule("mask_emb", f"{SPEECH}.mask_token.embedding", theirs_shape=(-1,), ours_shape=(1, -1)),
    Rule("feature_extractor.conv_layers.{i}.0.{p}", f"{SPEECH}.features.convs.{{i}}.{{p}}"),
    Rule("feature_extractor.conv_layers.{i}.2.1.{p}", f"{SPEECH}.features.norms.{{i}}.{{p}}"),
    Rule("layer_norm.{p}", f"{SPEECH}.features.norm.{{p}}"),
    Rule("post_extract_proj.{p}", f"{SPEECH}.features.proj.{{p}}"),
    Rule("encoder.pos_conv.{i}.0.{p}", f"{SPEECH}.positions.convs.{{i}}.{{p}}"),
    Rule("encoder.layer_norm.{p}", f"{SPEECH}.context.norm.{{p}}"),
    *blocks_v1("encoder.layers"),
    Rule("final_proj.{p}", "predictors.speech.proj.{p}"),
    Rule("final_proj.{i}.{p}", "predictors.speech.proj.{i}.{p}"),
    left_out("_ema"),
]

SENTENCE = "encoder.sentence_encoder"

FAIRSEQ_V1_TEXT = [
    Rule(f"{SENTENCE}.embed_tokens.weight", f"{TEXT}.features.tokens.weight"),
    Rule(f"{SENTENCE}.embed_positions.weight", f"{TEXT}.features.positions.weight"),
    Rule(f"{SENTENCE}.layernorm_embedding.{{p}}", f"{TEXT}.features.norm.{{p}}"),
    *blocks_v1(f"{SENTENCE}.layers"),
    Rule("encoder.regression_head.{i}.{p}", "predictors.text.proj.{i}.{p}"),
    left_out(f"{SENTENCE}.version"),
    left_out("encoder._ema"),
]

BEIT_V1_VISION = [
    Rule("cls_token", f"{VISION}.extra.embedding", (1, -1, 0), (-1,)),
    Rule(
        "mask_token", f"{VISION}.mask_token.embedding", theirs_shape=(1, 1, -1), ours_shape=(1, -1)
    ),
    Rule("patch_embed.proj.{p}", f"{VISION}.features.proj.{{p}}"),
    Rule("rel_pos_bias.relative_position_bias_table", f"{VISION}.bias.table"),
    Rule("blocks.{i}.gamma_1", "encoder.trunk.blocks.{i}.branch1.scale"),
    Rule("blocks.{i}.gamma_2", "encoder.trunk.blocks.{i}.branch2.scale"),
    Rule("blocks.{i}.attn.q_bias", "encoder.trunk.blocks.{i}.attention.q_bias"),
    Rule("blocks.{i}.attn.v_bias", "encoder.trunk.blocks.{i}.attention.v_bias"),
    *blocks_v2("blocks.{i}", "encoder.trunk.blocks.{i}"),
    Rule("norm.{p}", "encoder.trunk.norm.{p}"),
    Rule("lm_head.{p}", "predictors.vision.proj.{p}"),
    left_out("rel_pos_bias.relative_position_index"),
]

FAIRSEQ = {
    ("speech", "1.0"): FAIRSEQ_V1_SPEECH,
    ("vision", "1.0"): BEIT_V1_VISION,
    ("text", "1.0"): FAIRSEQ_V1_TEXT,
    ("speech", "2.0"): FAIRSEQ_V2_SPEECH,
    ("vision", "2.0"): FAIRSEQ_V2_VISION,
    ("text", "2.0"): FAIRSEQ_V2_TEXT,
}

# ---------------------------------------------------------------------- Hugging Face transformers

TRUNK = "encoder.trunk.blocks.{i}"

HUGGING_FACE_SPEECH = [  # Data2VecAudioModel
    Rule(
        "masked_spec_embed",
        f"{SPEECH}.mask_token.embedding",
        theirs_shape=(-1,),
        ours_shape=(1, -1),
    ),
    Rule("feature_extractor.conv_layers.{i}.conv.{p}", f"{SPEECH}.features.convs.{{i}}.{{p}}"),
    Rule(
        "feature_extractor.conv_layers.{i}.layer_norm.{p}", f"{SPEECH}.features.norms.{{i}}.{{p}}"
    ),
    Rule("feature_projection.layer_norm.{p}", f"{SPEECH}.features.norm.{{p}}"),
    Rule("feature_projection.projection.{p}", f"{SPEECH}.features.proj.{{p}}"),
    Rule("encoder.pos_conv_embed.layers.{i}.conv.{p}", f"{SPEECH}.positions.convs.{{i}}.{{p}}"),
    Rule("encoder.layer_norm.{p}", f"{SPEECH}.context.norm.{{p}}"),
    Rule(
        tuple(f"encoder.layers.{{i}}.attention.{x}_proj.{{p}}" for x in "qkv"),
        f"{TRUNK}.attention.qkv.{{p}}",
    ),
    Rule("encoder.layers.{i}.attention.out_proj.{p}", f"{TRUNK}.attention.proj.{{p}}"),
    Rule("encoder.layers.{i}.layer_norm.{p}", f"{TRUNK}.norm1.{{p}}"),
    Rule("encoder.layers.{i}.feed_forward.intermediate_dense.{p}", f"{TRUNK}.ffn.fc1.{{p}}"),
    Rule("encoder.layers.{i}.feed_forward.output_dense.{p}", f"{TRUNK}.ffn.fc2.{{p}}"),
    Rule("encoder.layers.{i}.final_layer_norm.{p}", f"{TRUNK}.norm2.{{p}}"),
    left_out(ours="predictors.speech.{rest}"),
]

HF_LAYER = "encoder.layer.{i}"

HUGGING_FACE_VISION = [  # Data2VecVisionModel
    Rule("embeddings.cls_token", f"{VISION}.extra.embedding", (1, -1, 0), (-1,)),
    Rule(
        "embeddings.mask_token",
        f"{VISION}.mask_token.embedding",
        theirs_shape=(1, 1, -1),
        ours_shape=(1, -1),
    ),
    Rule("embeddings.patch_embeddings.projection.{p}", f"{VISION}.features.proj.{{p}}"),
    Rule("encoder.relative_position_bias.relative_position_bias_table", f"{VISION}.bias.table"),
    Rule(
        tuple(f"{HF_LAYER}.attention.attention.{x}.weight" for x in ("query", "key", "value")),
        f"{TRUNK}.attention.qkv.weight",
    ),
    Rule(f"{HF_LAYER}.attention.attention.query.bias", f"{TRUNK}.attention.q_bias"),
    Rule(f"{HF_LAYER}.attention.attention.value.bias", f"{TRUNK}.attention.v_bias"),
    Rule(f"{HF_LAYER}.attention.output.dense.{{p}}", f"{TRUNK}.attention.proj.{{p}}"),
    Rule(f"{HF_LAYER}.layernorm_before.{{p}}", f"{TRUNK}.norm1.{{p}}"),
    Rule(f"{HF_LAYER}.layernorm_after.{{p}}", f"{TRUNK}.norm2.{{p}}"),
    Rule(f"{HF_LAYER}.intermediate.dense.{{p}}", f"{TRUNK}.ffn.fc1.{{p}}"),
    Rule(f"{HF_LAYER}.output.dense.{{p}}", f"{TRUNK}.ffn.fc2.{{p}}"),
    Rule(f"{HF_LAYER}.lambda_1", f"{TRUNK}.branch1.scale"),
    Rule(f"{HF_LAYER}.lambda_2", f"{TRUNK}.branch2.scale"),
    Rule("layernorm.{p}", "encoder.trunk.norm.{p}"),
    left_out(ours="predictors.vision.{rest}"),
]

HUGGING_FACE_TEXT = [  # Data2VecTextModel
    Rule("embeddings.word_embeddings.weight", f"{TEXT}.features.tokens.weight"),
    Rule("embeddings.position_embeddings.weight", f"{TEXT}.features.positions.weight"),
    Rule("embeddings.token_type_embeddings.weight", "", (1, 0), zeros=True),
    Rule("embeddings.LayerNorm.{p}", f"{TEXT}.features.norm.{{p}}"),
    Rule(
        tuple(f"{HF_LAYER}.attention.self.{x}.{{p}}" for x in ("query", "key", "value")),
        f"{TRUNK}.attention.qkv.{{p}}",
    ),
    Rule(f"{HF_LAYER}.attention.output.dense.{{p}}", f"{TRUNK}.attention.proj.{{p}}"),
    Rule(f"{HF_LAYER}.attention.output.LayerNorm.{{p}}", f"{TRUNK}.norm1.{{p}}"),
    Rule(f"{HF_LAYER}.intermediate.dense.{{p}}", f"{TRUNK}.ffn.fc1.{{p}}"),
    Rule(f"{HF_LAYER}.output.dense.{{p}}", f"{TRUNK}.ffn.fc2.{{p}}"),
    Rule(f"{HF_LAYER}.output.LayerNorm.{{p}}", f"{TRUNK}.norm2.{{p}}"),
    left_out(ours="predictors.text.{rest}"),
]

HUGGING_FACE = {
    ("speech", "1.0"): HUGGING_FACE_SPEECH,
    ("vision", "1.0"): HUGGING_FACE_VISION,
    ("text", "1.0"): HUGGING_FACE_TEXT,
}

# Heads of fine-tuned models, by their names in the whole model.
HUGGING_FACE_HEADS = {
    "speech": [Rule("lm_head.{p}", "head.proj.{p}")],  # Data2VecAudioForCTC
    "vision": [  # Data2VecVisionForImageClassification
        Rule("data2vec_vision.pooler.layernorm.{p}", "head.norm.{p}"),
        Rule("classifier.{p}", "head.proj.{p}"),
    ],
    "text": [  # Data2VecTextForSequenceClassification
        Rule("classifier.dense.{p}", "head.dense.{p}"),
        Rule("classifier.out_proj.{p}", "head.proj.{p}"),
    ],
}
