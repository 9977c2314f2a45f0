"""Checkpoints of fairseq (data2vec 1.0 and 2.0) and of data2vec_vision (1.0, based on BEiT).

    {"model": state, "cfg" or "args": settings, ...} --open_fairseq--> Weights

The state has the student's tensors, and the averages of fairseq's teacher as the entry `_ema`, with
names relative to the averaged part; data2vec_vision stores them beside it, as `model_ema`. A
fine-tuned speech model (CTC) has its encoder under w2v_encoder.w2v_model. and no teacher.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from d2v_ds.config.decoding import value_at
from d2v_ds.errors import UserError
from d2v_ds.key_maps import FAIRSEQ, Rule, is_known, named_error, to_ours
from d2v_ds.weights.assemble import Foreign, assemble
from d2v_ds.weights.fairseq_settings import copied_parts, translate
from d2v_ds.weights.model import Settings, Weights
from d2v_ds.weights.unpickle import Refused, load_pickled

MARKS = {  # a name that only this variant has: (modality, version)
    r"modality_encoders\.AUDIO\..*": ("speech", "2.0"),
    r"modality_encoders\.IMAGE\..*": ("vision", "2.0"),
    r"modality_encoders\.TEXT\..*": ("text", "2.0"),
    r"feature_extractor\.conv_layers\..*": ("speech", "1.0"),
    r"encoder\.sentence_encoder\..*": ("text", "1.0"),
    r"patch_embed\.proj\..*": ("vision", "1.0"),
}
# Parts of the student that a teacher's names can be relative to.
AVERAGED = ("", "encoder.", "encoder.sentence_encoder.", "blocks.")
ENCODER, PROJECTION = "w2v_encoder.w2v_model.", "w2v_encoder.proj."  # of a fine-tuned model
# Heads of 1.0 for text that are not a part of pre-training.
UNUSED = ("encoder.lm_head.", "classification_heads.")
KINDS = "checkpoints of data2vec from fairseq and data2vec_vision"


def open_fairseq(path: Path) -> Weights:
    """The weights in a checkpoint of fairseq or data2vec_vision. Raises UserError."""
    try:
        content = load_pickled(path)
        state = content.get("model", content) if isinstance(content, dict) else None
        if not isinstance(state, dict) or not any(isinstance(v, Tensor) for v in state.values()):
            raise Refused(f"has no weights of a model; supported are {KINDS}")
        return assemble(foreign(path, content, state))
    except Refused as error:
        raise UserError(f"{path}: {error}") from None


def foreign(path: Path, content: Settings, state: dict[str, Any]) -> Foreign:
    settings, flat = configuration(content), tensors_of(state)
    averages: Any = next((state[name] for name in state if name.split(".")[-1] == "_ema"), {})
    head = renamed(flat, PROJECTION, "head.proj.")
    if finetuned := any(name.startswith(ENCODER) for name in flat):
        others = {name: flat[name] for name in flat if not name.startswith((ENCODER, PROJECTION))}
        flat = renamed(flat, ENCODER, "") | others
        settings = value_at(settings, "model.w2v_args") or {}
    modality, version = variant(flat)
    unused = [name for name in flat if name.startswith(UNUSED)]
    flat = {name: flat[name] for name in flat if name not in unused}
    if (modality, version) == ("vision", "1.0"):
        averages = content.get("model_ema", {})
    try:
        given = translate(modality, version, settings)
    except UserError as error:
        raise Refused(f"its configuration has {error}") from None
    rules = FAIRSEQ[modality, version]
    found = Foreign(
        path=path,
        modality=modality,
        version=version,
        student=ours(flat, rules, modality, version),
        teacher=ours(relocated(averages, rules), rules, modality, version),
        head=head,
        given=given,
        copied=copied_parts(modality, version, settings),
        step=steps(content),
        about={"source": f"a checkpoint of data2vec {version} for {modality}", "file": path.name},
    )
    found.left_out(unused)
    if not settings:
        found.assume("The file has no configuration.")
    if finetuned:
        found.finetune = {"task": "ctc", "labels": labels(content, head)}
    if value_at(settings, "task.normalize") is False:
        found.assume("It was trained on waveforms that were not normalised; ours always are.")
    return found


def configuration(content: Settings) -> Settings:
    """{"model": ..., "task": ...} of fairseq, or the flat arguments of older files and of BEiT,
    which are then also under "model" and "task"."""
    if isinstance(content.get("cfg"), dict):
        return dict(content["cfg"])
    args = content.get("args")
    return {**args, "model": args, "task": args} if isinstance(args, dict) else {}


def tensors_of(state: Any) -> dict[str, Tensor]:
    """The parameters in a state, in fp32, without its indices and versions of formats."""
    if not isinstance(state, dict):
        return {}
    return {
        str(name): value.float()
        for name, value in state.items()
        if isinstance(value, Tensor)
        and value.is_floating_point()
        and str(name).split(".")[-1] != "version"
    }


def renamed(state: Mapping[str, Tensor], old: str, new: str) -> dict[str, Tensor]:
    """The tensors whose names start with `old`, with `new` in its place."""
    return {
        new + name.removeprefix(old): value for name, value in state.items() if name.startswith(old)
    }


def variant(state: Mapping[str, Tensor]) -> tuple[str, str]:
    """(modality, version) of a model by its names. Raises Refused."""
    found = {kind for mark, kind in MARKS.items() if any(re.match(mark, n) for n in state)}
    if len(found) == 1:
        return found.pop()
    if found:
        names = ", ".join(sorted(name for name, _ in found))
        raise Refused(f"has parts of several models ({names}); supported are {KINDS}")
    raise Refused(
        f"has no parameter of data2vec (but {next(iter(state), 'none')}); supported are {KINDS}"
    )


def ours(
    state: Mapping[str, Tensor], rules: Sequence[Rule], modality: str, version: str
) -> dict[str, Tensor]:
    """The tensors with our names. Raises Refused for an unknown name."""
    try:
        tensors = to_ours(state, rules)
    except KeyError as error:
        raise Refused(named_error(error, f"data2vec {version} for {modality}")) from None
    # Some files number the layers of a head that has only one.
    first, second = (f"predictors.{modality}.proj.{i}." for i in (0, 2))
    if any(name.startswith(second) for name in tensors):
        return tensors
    single = f"predictors.{modality}.proj."
    return {
        single + name.removeprefix(first) if name.startswith(first) else name: value
        for name, value in tensors.items()
    }


def relocated(averages: Any, rules: Sequence[Rule]) -> dict[str, Tensor]:
    """The teacher's tensors with names relative to the whole model. Raises Refused."""
    found = tensors_of(averages)
    unknown = {p: [name for name in found if not is_known(p + name, rules)] for p in AVERAGED}
    prefix = min(unknown, key=lambda p: len(unknown[p]))
    if unknown[prefix]:
        raise Refused(f"{unknown[prefix][0]}: no parameter of its teacher")
    return renamed(found, "", prefix)


def steps(content: Settings) -> int:
    """Updates of the run; 0 if the file does not say."""
    history = content.get("optimizer_history")
    last = history[-1] if isinstance(history, list) and history else None
    number = last.get("num_updates") if isinstance(last, dict) else None
    return number if isinstance(number, int) else 0


def labels(content: Settings, head: Mapping[str, Tensor]) -> list[str]:
    """The labels of a CTC head; the first is the blank, for which fairseq uses <s>. Raises
    Refused."""
    symbols = value_at(content, "task_state.target_dictionary.symbols")
    if not isinstance(symbols, list):
        raise Refused(
            "is fine-tuned, but lacks the dictionary of its labels (task_state.target_dictionary)"
        )
    rows = len(head.get("head.proj.weight", ()))
    if len(symbols) != rows:
        raise Refused(f"has {len(symbols)} labels, but a head for {rows}")
    return ["<blank>", *map(str, symbols[1:])]
