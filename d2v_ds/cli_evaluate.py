"""The commands `evaluate` and `features` of d2v-ds: their options and what they run.

Importing this module imports no torch.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Literal

from d2v_ds import exit_codes
from d2v_ds.arguments import positive

PROBE_HELP = (
    "knn: nearest neighbours by cosine, without training; ridge: ridge regression; logistic: "
    "logistic regression; linear: a linear layer; attentive: attention pooling over tokens and a "
    "linear layer"
)


def block(text: str) -> int | Literal["all"]:
    """The number of a block, or "all"."""
    return "all" if text == "all" else positive(text)


def add_evaluate(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "probe", choices=["knn", "ridge", "logistic", "linear", "attentive"], help=PROBE_HELP
    )
    command.add_argument("run", type=Path, metavar="RUN", help="a run folder or a checkpoint")
    command.add_argument(
        "--gallery",
        "--train",
        dest="train",
        required=True,
        metavar="SET",
        help="labelled shard set that the probe is fitted on; of knn, the set of the neighbours",
    )
    command.add_argument(
        "--test", required=True, nargs="+", metavar="SET", help="labelled shard sets to score"
    )
    command.add_argument(
        "--label",
        default="label",
        metavar="COLUMN",
        help="the column with the label (default: label)",
    )
    command.add_argument(
        "--weights",
        choices=["student", "teacher", "both"],
        default="student",
        help="the weights to probe (default: student)",
    )
    command.add_argument(
        "--layer",
        type=block,
        metavar="N|all",
        help="the block whose output is probed, counted from 1; all: the block that is best on a "
        "held-out part of the training set (default: the middle block)",
    )
    add_modality(command)
    command.add_argument(
        "--compare",
        action="store_true",
        help="also score the untrained encoder and plain features of the input",
    )


def add_modality(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--modality",
        metavar="NAME",
        help="the modality of the encoder; needed if the run has several",
    )


def add_features(command: argparse.ArgumentParser) -> None:
    command.add_argument("source", type=Path, metavar="SOURCE", help="a run folder or a checkpoint")
    command.add_argument("set", metavar="SET", help="the shard set to encode")
    command.add_argument("out", type=Path, metavar="OUT", help="the folder to write into")
    command.add_argument(
        "--layer",
        type=positive,
        required=True,
        metavar="N",
        help="the block whose output is written, counted from 1",
    )
    command.add_argument(
        "--weights",
        choices=["student", "teacher"],
        default="student",
        help="the weights to use (default: student)",
    )
    add_modality(command)
    command.add_argument(
        "--pool",
        choices=["mean", "none"],
        default="mean",
        help="mean: one vector for each sample; none: one for each token (default: mean)",
    )
    command.add_argument(
        "--format",
        choices=["npy", "parquet"],
        default="npy",
        help="npy: arrays and lists of keys; parquet: tables with the columns of each sample's "
        ".json (default: npy)",
    )
    command.add_argument(
        "--batch",
        type=positive,
        default=16,
        metavar="N",
        help="samples in one forward pass (default: 16)",
    )
    command.add_argument(
        "--nproc",
        type=positive,
        metavar="N",
        help="ranks to start on this machine; they divide the shards (default: those of the "
        "launcher, or one)",
    )


# ------------------------------------------------------------------------------------ the commands


def evaluate_run(arguments: argparse.Namespace) -> int:
    from d2v_ds import evaluate

    table, summary = evaluate.run_probe(
        arguments.run,
        probe=arguments.probe,
        train=arguments.train,
        tests=arguments.test,
        label=arguments.label,
        weights=arguments.weights,
        layer=arguments.layer,
        modality=arguments.modality,
        compare=arguments.compare,
    )
    print(table)
    given = {name: value for name, value in vars(arguments).items() if name != "command"}
    print(evaluate.as_json(summary, evaluate.record(arguments.run, summary, given)))
    return exit_codes.FINISHED


def features_run(arguments: argparse.Namespace) -> int:
    from d2v_ds import features
    from d2v_ds.distributed.launcher import launch
    from d2v_ds.distributed.world import World
    from d2v_ds.errors import UserError

    wanted = features.Request(
        source=arguments.source,
        shards=arguments.set,
        out=arguments.out,
        layer=arguments.layer,
        weights=arguments.weights,
        modality=arguments.modality or "",
        pool=arguments.pool,
        format=arguments.format,
        batch=arguments.batch,
    )
    world = World.from_environment()
    if world.address and arguments.nproc is not None:
        given = f"a launcher has already started {world.size} ranks"
        raise UserError(f"--nproc: {given}. Omit --nproc.")
    if (arguments.nproc or 1) == 1:
        features.write(wanted, world)
        print(features.report(wanted, world))
        return exit_codes.FINISHED
    features.open_request(wanted)  # so that mistakes are reported once and at once
    code = launch(arguments.nproc, features_arguments(arguments))
    if code == exit_codes.FINISHED:
        print(features.report(wanted))
    return code


def features_arguments(arguments: argparse.Namespace) -> list[str]:
    """The command line of one rank."""
    names = ("layer", "weights", "modality", "pool", "format", "batch")
    given = {name: getattr(arguments, name) for name in names}
    options = [word for name, x in given.items() if x is not None for word in (f"--{name}", str(x))]
    return ["features", str(arguments.source), arguments.set, str(arguments.out), *options]
