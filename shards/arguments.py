"""What the values of options mean: types for argparse, which turns their errors into one line."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Mapping
from typing import TypeVar

from d2v_ds.arguments import size as size
from d2v_ds.errors import UserError

Number = TypeVar("Number", int, float)


def number(kind: type[Number], low: float, high: float) -> Callable[[str], Number]:
    def parse(text: str) -> Number:
        try:
            value = kind(text)
        except ValueError:
            value = kind(-1)
        if not low <= value <= high:
            name = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text}: expected {name} from {low} to {high}")
        return value

    return parse


def task(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or int(found[1]) >= int(found[2]):
        raise argparse.ArgumentTypeError(f"{text}: expected I/N with I from 0 to N - 1, as in 0/8")
    return int(found[1]), int(found[2])


def task_of_slurm(environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """(i, n) of the array job that this process is a task of, (0, 1) elsewhere. Raises UserError
    for an array with gaps, whose tasks would leave shards out."""
    if "SLURM_ARRAY_TASK_ID" not in environment:
        return 0, 1
    names = ("ID", "MIN", "MAX", "COUNT")
    own, first, last, count = (int(environment[f"SLURM_ARRAY_TASK_{name}"]) for name in names)
    if last - first + 1 != count:
        raise UserError(
            f"SLURM_ARRAY_TASK_COUNT={count}: the array must count without gaps, as in "
            "--array=0-7; or say which part is this with --task I/N"
        )
    return own - first, count


def share(text: str) -> float:
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a share such as 1% or 0.01")
    return value


def splits(text: str) -> dict[str, float]:
    """`train=98,valid=1,test=1` -> the share of each, summing to 1."""
    pairs = re.findall(r"([\w-]+)=(\d+(?:\.\d+)?)%?(?:,|$)", text)
    weights = {name: float(weight) for name, weight in pairs}
    total = sum(weights.values())
    whole = ",".join("=".join(pair) for pair in pairs) == text.replace("%", "")
    if not whole or len(weights) != len(pairs) or not total or 0 in weights.values():
        raise argparse.ArgumentTypeError(
            f"{text}: expected names with their shares, as in train=98,valid=1,test=1"
        )
    return {name: weight / total for name, weight in weights.items()}
