"""Starting from weights: copies them into a new task, and reports by name what was copied.

    Weights --initialise--> parameters of the task; the teacher's averages become copies of them

What would silently train another model is an error: parameters with other shapes, an encoder that
is only partly covered, and settings that change what the same weights compute.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2v_ds.config.decoding import differences, value_at
from d2v_ds.errors import UserError
from d2v_ds.task import Task
from d2v_ds.weights.model import Weights, Which, refuse_not_finite

# Settings without an influence on shapes that change what the weights compute.
STRUCTURE = ("heads", "norm", "norm_eps", "convs", "positions", "patch_size", "pad_id", "alibi")
SHOWN = 8  # names in a message
SHOWN_SHAPES = 3


@dataclass(frozen=True)
class Initialised:
    """What `initialise` did, by our names (encoder.*, predictors.*, head.*)."""

    path: Path
    which: Which
    step: int
    copied: list[str]
    new: list[str]  # not in the weights: random
    unused: list[str]  # in the weights, not in the task
    skipped: list[str]  # in both, but named in init_skip
    settings: list[str]  # model.* and modality.* that differ, without an influence on the encoder

    def lines(self) -> list[str]:
        """The report for the log."""
        source = f"{self.path} ({self.which}{f', step {self.step}' if self.step else ''})"
        lines = [f"init: {len(self.copied)} parameters from {source}: {grouped(self.copied)}"]
        for names, meaning in (
            (self.new, "new, with random values"),
            (self.unused, "in init but not in this model, so not used"),
            (self.skipped, "in init but named in init_skip, so with random values"),
        ):
            if names:
                lines.append(f"init: {len(names)} parameters are {meaning}: {grouped(names)}")
        if self.settings:
            lines.append(f"init: settings that differ from its run: {'; '.join(self.settings)}")
        return lines

    def as_json(self) -> dict[str, Any]:
        return {**vars(self), "path": str(self.path)}


@torch.no_grad()
def initialise(
    task: Task, weights: Weights, which: Which, skip: Sequence[str], settings: Mapping[str, Any]
) -> Initialised:
    """Copies the weights into a task, in fp32. skip: patterns of parameters that keep their values.
    settings: those of the task, {"model": model.*, "modality": modality.*}, with every default, and
    "labels" of a task with a head.

    The teacher's averages become copies of the student's parameters. Raises UserError if a
    parameter of both differs in shape and is not skipped, if the encoder is not covered by both
    sides, if a setting in STRUCTURE differs, if a pattern matches nothing, or if a value is not
    finite.
    """
    prefix = task.weights_prefix
    ours = {
        name.removeprefix(prefix): parameter
        for name, parameter in task.named_parameters()
        if name.startswith(prefix) and not name.startswith("teacher.")
    }
    theirs = values_of(weights, which)
    for pattern in skip:
        if not any(fnmatchcase(name, pattern) for name in ours):
            raise UserError(f"init_skip: {pattern!r} matches no parameter of this model")
    skipped = [n for n in ours if any(fnmatchcase(n, pattern) for pattern in skip)]
    names = [n for n in ours if n in theirs and n not in skipped]
    refuse_other_shapes(weights, {n: (ours[n], theirs[n]) for n in names})
    done = Initialised(
        path=weights.path,
        which=which,
        step=weights.step,
        copied=names,
        new=[n for n in ours if n not in theirs and n not in skipped],
        unused=[n for n in theirs if n not in ours],
        skipped=[n for n in skipped if n in theirs],
        settings=differing_settings(settings, weights),
    )
    refuse_other_encoder(task, weights, done, skip)
    if any(name.startswith("head.") for name in names):
        refuse_other_labels(weights, settings)
    for name in names:
        refuse_not_finite(weights.path, name, theirs[name])
        ours[name].copy_(theirs[name])
    parameters = dict(task.named_parameters())
    for average, student in task.averages().items():
        parameters[average].copy_(parameters[student])
    return done


def values_of(weights: Weights, which: Which) -> dict[str, Tensor]:
    """{our name: tensor}: the chosen encoder, and predictors and heads, which have no average."""
    encoder = {f"encoder.{name}": value for name, value in weights.encoder(which).items()}
    others = {**weights.tensors("student"), **weights.tensors("head")}
    return encoder | {n: v for n, v in others.items() if not n.startswith("encoder.")}


def refuse_other_shapes(weights: Weights, pairs: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    wrong = [
        f"{name} is {list(theirs.shape)} in init, {list(ours.shape)} here"
        for name, (ours, theirs) in pairs.items()
        if ours.shape != theirs.shape
    ]
    if wrong:
        raise UserError(
            f"init: {weights.path}: shapes differ: {listed(wrong, SHOWN_SHAPES)}. Use the model.* "
            "and modality.* of init, or name parameters that are to keep their random values in "
            "init_skip"
        )


def refuse_other_encoder(
    task: Task, weights: Weights, done: Initialised, skip: Sequence[str]
) -> None:
    """Raises UserError if the encoders of a common modality do not have the same parameters."""
    common = task.modalities.keys() & weights.modality.keys()
    if not common:
        raise UserError(
            f"init: {weights.path}: has {', '.join(weights.modality)}, this run has "
            f"{', '.join(task.modalities)}; none is in both"
        )

    def of_common(names: Iterable[str]) -> list[str]:
        return [n for n in names if (own := modality_of(n)) == "" or own in common]

    for names, problem in (
        (of_common(done.new), "init lacks"),
        (of_common(n for n in done.unused if not matches(n, skip)), "this model lacks"),
    ):
        if names:
            raise UserError(
                f"init: {weights.path}: is another encoder: {problem} {listed(names)}. Change "
                "model.* or modality.* to those of init, or name these parameters in init_skip"
            )


def refuse_other_labels(weights: Weights, settings: Mapping[str, Any]) -> None:
    """Raises UserError if the outputs of a head mean something else in this run."""
    before, now = list(weights.finetune.get("labels", ())), list(settings.get("labels", ()))
    if before != now:
        raise UserError(
            f"init: {weights.path}: its head has other labels ({', '.join(before[:5])} ...) than "
            f"this run ({', '.join(now[:5])} ...). Give finetune.labels of init, or start with a "
            "new head: init_skip=[head.*]"
        )


def matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def modality_of(name: str) -> str | None:
    """The modality of a parameter of the encoder, "" for the trunk; None outside the encoder."""
    pieces = name.split(".")
    if pieces[0] != "encoder":
        return None
    return pieces[2] if pieces[1] == "front_ends" else ""


def differing_settings(ours: Mapping[str, Any], weights: Weights) -> list[str]:
    """The settings of the encoder that differ, as text. Raises UserError for those that change
    what the weights compute."""
    common = ours["modality"].keys() & weights.modality.keys()
    now_, before_ = (
        {"model": model, "modality": {name: modality[name] for name in common}}
        for model, modality in (
            (ours["model"], ours["modality"]),
            (weights.model, weights.modality),
        )
    )
    shown = []
    for path in differences(before_, now_):
        before, now = value_at(before_, path), value_at(now_, path)
        text = f"{path} was {before!r}, is {now!r}"
        if path.split(".")[-1] in STRUCTURE:
            raise UserError(
                f"init: {weights.path}: was trained with another {path}: {before!r}, here {now!r}. "
                f"Set {path} to the value of init"
            )
        shown.append(text)
    return shown


# ----------------------------------------------------------------------------------------- messages


def listed(items: Sequence[str], most: int = SHOWN) -> str:
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more


def grouped(names: Iterable[str]) -> str:
    """Names with equal ones but for numbers written once: encoder.trunk.blocks.{0..3}.norm1.*"""
    numbers: dict[str, set[int]] = {}
    for name in names:
        pattern, count = re.subn(r"\.\d+\.", ".{}.", name.rpartition(".")[0] + ".", count=1)
        found = re.search(r"\.(\d+)\.", name) if count else None
        numbers.setdefault(pattern + "*", set()).update([int(found[1])] if found else [])
    return ", ".join(
        pattern.replace("{}", f"{{{min(n)}..{max(n)}}}" if len(n) > 1 else str(min(n)), 1)
        if n
        else pattern
        for pattern, n in numbers.items()
    )
