"""Weight names of the original implementations <-> ours: tables and pure functions.

A rule pairs two name templates in which {i} and {j} stand for layer numbers, {i+1} for a number
that counts from one, and {p} for what follows (weight or bias). Names are those of a student.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Rule:
    theirs: str
    ours: str
    shape: tuple[int, ...] | None = None  # of their tensor, where it differs by unit dimensions


def block_rules(theirs: str, ours: str) -> list[Rule]:
    """One transformer block of fairseq's data2vec 2.0."""
    pairs = {
        "norm1": "norm1",
        "norm2": "norm2",
        "attn.qkv": "attention.qkv",
        "attn.proj": "attention.proj",
        "mlp.fc1": "ffn.fc1",
        "mlp.fc2": "ffn.fc2",
    }
    return [Rule(f"{theirs}.{a}.{{p}}", f"{ours}.{b}.{{p}}") for a, b in pairs.items()]


AUDIO = "modality_encoders.AUDIO"
SPEECH = "encoder.front_ends.speech"

# data2vec 2.0 speech as fairseq names it (data2vec.md 8.4, last table)
FAIRSEQ_V2_SPEECH = [
    Rule(f"{AUDIO}.alibi_scale", f"{SPEECH}.alibi.scale", shape=(1, 1, -1, 1, 1)),
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
    Rule(f"{AUDIO}.context_encoder.norm.{{p}}", f"{SPEECH}.context.norm.{{p}}"),
    *block_rules(f"{AUDIO}.context_encoder.blocks.{{i}}", f"{SPEECH}.context.prenet.blocks.{{i}}"),
    Rule(f"{AUDIO}.decoder.blocks.{{i}}.0.{{p}}", "predictors.speech.convs.{i}.{p}"),
    Rule(f"{AUDIO}.decoder.proj.{{p}}", "predictors.speech.proj.{p}"),
    *block_rules("blocks.{i}", "encoder.trunk.blocks.{i}"),
]


def translate(name: str, rules: Sequence[Rule], *, to_ours: bool) -> tuple[str, Rule]:
    """The other side's name and the rule that gave it. Raises KeyError when no rule fits."""
    for rule in rules:
        source, target = (rule.theirs, rule.ours) if to_ours else (rule.ours, rule.theirs)
        found = re.fullmatch(_pattern(source), name)
        if found:
            return _fill(target, source, found.groupdict()), rule
    raise KeyError(name)


def _pattern(template: str) -> str:
    parts = re.split(r"\{(\w)(?:\+1)?\}", template)  # literal, name, literal, name, ...
    groups = {"p": "(?P<p>weight|bias)"}
    return "".join(
        re.escape(part) if n % 2 == 0 else groups.get(part, rf"(?P<{part}>\d+)")
        for n, part in enumerate(parts)
    )


def _fill(template: str, source: str, values: Mapping[str, str]) -> str:
    for letter, value in values.items():
        if letter == "p":
            template = template.replace("{p}", value)
            continue
        number = int(value) - (f"{{{letter}+1}}" in source)  # now counted from zero
        template = template.replace(f"{{{letter}}}", str(number))
        template = template.replace(f"{{{letter}+1}}", str(number + 1))
    return template


def to_ours(state: Mapping[str, Tensor], rules: Sequence[Rule]) -> dict[str, Tensor]:
    """Their state dict under our names and in our shapes. Raises KeyError for an unknown name."""
    result = {}
    for theirs, tensor in state.items():
        ours, rule = translate(theirs, rules, to_ours=True)
        result[ours] = tensor.squeeze() if rule.shape else tensor
    return result


def to_theirs(state: Mapping[str, Tensor], rules: Sequence[Rule]) -> dict[str, Tensor]:
    """Our state dict under their names and in their shapes. Raises KeyError for an unknown name."""
    result = {}
    for ours, tensor in state.items():
        theirs, rule = translate(ours, rules, to_ours=False)
        result[theirs] = tensor.reshape(rule.shape) if rule.shape else tensor
    return result
