"""Options that several commands share, and types of option values, whose errors argparse turns into
one line."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from d2v_ds.arguments import size
from d2v_ds.errors import UserError

Number = TypeVar("Number", int, float)


def number(kind: type[Number], low: float, high: float) -> Callable[[str], Number]:
    def parse(text: str) -> Number:
        try:
            value = kind(text)
        except ValueError:
            value = kind(-1)
        if not low <= value <= high:
            name = "an integer" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text}: expected {name} from {low} to {high}")
        return value

    return parse


def task(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or int(found[1]) >= int(found[2]):
        raise argparse.ArgumentTypeError(
            f"{text}: expected I/N with I from 0 to N - 1, for example 0/8"
        )
    return int(found[1]), int(found[2])


def task_of_slurm(environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """(i, n) if this process is task i of a Slurm array job with n tasks, otherwise (0, 1). Raises
    UserError for an array with gaps, whose tasks would skip shards."""
    if "SLURM_ARRAY_TASK_ID" not in environment:
        return 0, 1
    names = ("ID", "MIN", "MAX", "COUNT")
    own, first, last, count = (int(environment[f"SLURM_ARRAY_TASK_{name}"]) for name in names)
    if last - first + 1 != count:
        raise UserError(
            f"SLURM_ARRAY_TASK_COUNT={count}: the task ids of the array must have no gaps. For "
            "example, use --array=0-7, or set --task I/N"
        )
    return own - first, count


def share(text: str) -> float:
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a fraction, for example 1% or 0.01")
    return value


def splits(text: str) -> dict[str, float]:
    """`train=98,valid=1,test=1` -> {name: share}; the shares sum to 1."""
    pairs = re.findall(r"([\w-]+)=(\d+(?:\.\d+)?)%?(?:,|$)", text)
    weights = {name: float(weight) for name, weight in pairs}
    total = sum(weights.values())
    whole = ",".join("=".join(pair) for pair in pairs) == text.replace("%", "")
    if not whole or len(weights) != len(pairs) or not total or 0 in weights.values():
        raise argparse.ArgumentTypeError(
            f"{text}: expected NAME=SHARE,..., for example train=98,valid=1,test=1"
        )
    return {name: weight / total for name, weight in weights.items()}


# ------------------------------------------------------------------------------------------ options


def add_choice(parser: argparse.ArgumentParser) -> None:
    """Which samples, in which order, into which sets."""
    group = parser.add_argument_group("sets")
    group.add_argument(
        "--split",
        type=splits,
        metavar="NAME=SHARE,...",
        help="write several sets OUT/NAME, for example train=98,valid=1,test=1. Samples are "
        "assigned by the hash of their key, so they keep their split when the corpus grows",
    )
    group.add_argument(
        "--split-by",
        default="",
        metavar="COLUMN",
        help="split by the hash of this column instead, for example so that no speaker is in two "
        "sets",
    )
    add_chosen(group)
    group.add_argument(
        "--shard-size",
        type=size,
        default="256MB",
        metavar="SIZE",
        help="approximate upper limit for the input size of a shard (%(default)s)",
    )
    group.add_argument(
        "--seed",
        type=number(int, 0, 2**63),
        default=0,
        metavar="N",
        help="random seed for the order of the samples (%(default)s)",
    )


def add_chosen(parser: argparse._ActionsContainer) -> None:
    form = "a PATTERN of paths below SOURCE, for example 'train-clean-*/**', or a FILE that lists "
    form += "keys or paths, one per line"
    for name, dest, what in (
        ("--only", "only", "convert only what matches"),
        ("--except", "leave_out", "leave out what matches"),
    ):
        parser.add_argument(
            name,
            action="append",
            default=[],
            metavar="PATTERN",
            dest=dest,
            help=f"{what}: {form}; can be repeated",
        )


def add_sources(parser: argparse._ActionsContainer, help: str) -> None:
    parser.add_argument("source", type=Path, metavar="SOURCE", nargs="+", help=help)


def add_running(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("running")
    group.add_argument(
        "--dry-run",
        action="store_true",
        help="estimate the shards, their size and the time; write nothing",
    )
    add_max_bad(group)
    group.add_argument(
        "--task",
        type=task,
        metavar="I/N",
        help="run task I of an array job of N tasks (from 0): every N-th shard, starting with "
        "shard I; run merge when all tasks have finished (default: from SLURM_ARRAY_TASK_ID)",
    )
    add_jobs(group)


def add_max_bad(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--max-bad",
        type=share,
        default="1%",
        metavar="SHARE",
        help="stop if more than this fraction of the inputs cannot be used (%(default)s)",
    )


def add_jobs(parser: argparse._ActionsContainer) -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parser.add_argument(
        "-j",
        "--jobs",
        type=number(int, 1, 4096),
        default=cores,
        metavar="N",
        help="number of processes (default: one per core)",
    )
