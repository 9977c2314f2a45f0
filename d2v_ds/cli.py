"""The command `d2v-ds`: parses and calls, nothing else.

Whatever needs torch is imported by the command that needs it, and a training's mistakes are looked
for before that. Exit codes: 0 finished or stopped well, 1 failure, 2 bad input, 3 a health rule.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from d2v_ds import __version__, recipes
from d2v_ds.arguments import positive, size
from d2v_ds.errors import UserError

BAD_INPUT = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; the exit code."""
    arguments = parse(argv)
    try:
        code: int = arguments.command(arguments)
        return code
    except UserError as error:
        print(f"d2v-ds: {error}", file=sys.stderr)
        return BAD_INPUT
    except BrokenPipeError:  # the reader of our output has gone
        return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """As argparse does, but settings and options may stand in any order."""
    top = parser()
    arguments, rest = top.parse_known_args(argv)
    settings = [word for word in rest if "=" in word and not word.startswith("-")]
    if settings != rest or (settings and not hasattr(arguments, "overrides")):
        top.parse_args(argv)  # says what is wrong and exits with code 2
    if settings:
        arguments.overrides += settings
    return arguments


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="d2v-ds", description=__doc__.splitlines()[0])
    top.add_argument("--version", action="version", version=__version__)
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, function: object, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(command=function)
        return command

    add("recipes", list_recipes, "the named runs, a line each")

    show = add("show", show_run, "resolved configuration, parameters, memory and batch split")
    add_run(show)
    show.add_argument("--ranks", type=positive, default=8, metavar="N", help="default: 8")
    show.add_argument(
        "--gpu-memory",
        type=size,
        metavar="SIZE",
        help="of one GPU, as 80GiB: adds the smallest ZeRO stage and largest micro-batch that fit",
    )

    show.add_argument(
        "--measure",
        action="store_true",
        help="run the longest micro-batch on this machine instead of foretelling its memory",
    )

    train = add("train", train_run, "pre-train; goes on by itself where the run folder says so")
    add_run(train)
    train.add_argument(
        "--nproc",
        type=positive,
        metavar="N",
        help="ranks to start on this machine when no launcher did; default: one a GPU, or one",
    )
    train.add_argument("--new", action="store_true", help="refuse a folder that has checkpoints")
    train.add_argument(
        "--allow",
        action="append",
        default=[],
        metavar="KEY",
        help="a setting that may differ from the checkpoint's; may be repeated",
    )

    train.add_argument(
        "--check", action="store_true", help="look for mistakes, print the run's folder, and end"
    )

    status = add("status", show_status, "step, time left, last checkpoint, restarts, slowest rank")
    status.add_argument("run", type=Path, metavar="RUN", help="the run's folder")

    evaluate = add("evaluate", evaluate_run, "probes of the encoder on labelled shard sets")
    evaluate.add_argument("probe", choices=["knn"], help="knn: nearest neighbours, no training")
    evaluate.add_argument("run", type=Path, metavar="RUN", help="the run's folder, or a checkpoint")
    evaluate.add_argument("--gallery", required=True, metavar="SET", help="labelled shard set")
    evaluate.add_argument(
        "--test", required=True, nargs="+", metavar="SET", help="labelled shard sets to score"
    )
    evaluate.add_argument("--label", default="label", metavar="COLUMN", help="default: label")
    evaluate.add_argument("--weights", choices=["student", "teacher"], default="student")
    evaluate.add_argument(
        "--layer", type=positive, metavar="N", help="block, from 1; default: the middle one"
    )
    evaluate.add_argument(
        "--modality", metavar="NAME", help="of a run with several; default: its only one"
    )
    evaluate.add_argument(
        "--compare",
        action="store_true",
        help="beside it the untrained encoder and plain features of the input",
    )
    return top


def add_run(command: argparse.ArgumentParser) -> None:
    command.add_argument("source", metavar="RECIPE|FILE", help="a recipe, or a YAML file")
    command.add_argument(
        "overrides", nargs="*", metavar="key.path=value", help="settings to change"
    )


def list_recipes(arguments: argparse.Namespace) -> int:
    for name in recipes.RECIPES:
        print(f"{name:<16}{recipes.summary(name)}")
    return 0


def show_run(arguments: argparse.Namespace) -> int:
    config = recipes.load(arguments.source, arguments.overrides)
    if arguments.measure:  # torch's profiler, which counts a CPU's memory, else says when it starts
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    from d2v_ds import show

    print(show.describe(config, arguments.ranks, arguments.gpu_memory, measure=arguments.measure))
    return 0


def train_run(arguments: argparse.Namespace) -> int:
    from d2v_ds.run import preflight

    config = recipes.load(arguments.source, arguments.overrides)
    ranks = launched_ranks()
    if ranks is not None and arguments.nproc is not None and not arguments.check:
        raise UserError(f"--nproc: a launcher has already started {ranks} ranks; leave it away")
    ranks = arguments.nproc or ranks or gpus() or 1
    preflight.check(config, ranks)
    if arguments.check:
        print(config.run_dir)
        return 0
    if launched_ranks() is None and ranks > 1:
        from d2v_ds.distributed.launcher import launch

        return launch(ranks, train_arguments(arguments))

    from d2v_ds.distributed.world import World
    from d2v_ds.pretrain import Pretrain
    from d2v_ds.train import train

    return train(
        Pretrain,
        config,
        World.from_environment(),
        new=arguments.new,
        allow=tuple(arguments.allow),
    )


def train_arguments(arguments: argparse.Namespace) -> list[str]:
    """The command line of one rank."""
    allow = [word for key in arguments.allow for word in ("--allow", key)]
    new = ["--new"] * arguments.new
    return ["train", *new, *allow, arguments.source, *arguments.overrides]


def launched_ranks() -> int | None:
    """How many ranks a launcher started; None without one. As distributed.World reads it, which
    needs torch."""
    for name in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        if os.environ.get(name, "").isdecimal():
            return int(os.environ[name])
    return None


def gpus() -> int:
    """GPUs of this machine, without importing torch; 0 where there is no driver."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([gpu for gpu in visible.split(",") if gpu.strip() not in ("", "-1")])
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return 0
    return listed.stdout.count("GPU ") if listed.returncode == 0 else 0


def show_status(arguments: argparse.Namespace) -> int:
    from d2v_ds.run import status

    print(status.describe(arguments.run))
    return 0


def evaluate_run(arguments: argparse.Namespace) -> int:
    from d2v_ds import evaluate

    table, summary = evaluate.run_knn(
        arguments.run,
        gallery=arguments.gallery,
        tests=arguments.test,
        label=arguments.label,
        weights=arguments.weights,
        layer=arguments.layer,
        modality=arguments.modality,
        compare=arguments.compare,
    )
    print(table)
    print(json.dumps(summary))
    return 0
