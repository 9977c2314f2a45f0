"""The commands `evaluate` and `features` of d2v-ds: their options and what they run.

Importing this module imports no torch.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from d2v_ds import exit_codes
from d2v_ds.arguments import positive
from d2v_ds.errors import UserError

PROBE_HELP = (
    "of a frozen encoder: knn: nearest neighbours by cosine, without training; ridge: ridge "
    "regression; logistic: logistic regression; linear: a linear layer; attentive: attention "
    "pooling over tokens and a linear layer. Of a fine-tuned model: wer, accuracy or correlation, "
    "with all metrics of its task"
)
SOURCE_HELP = "a run folder, a checkpoint, an exported folder or other weights"
BEAM_DEFAULTS: dict[str, Any] = {"beam": 50, "lm_weight": 2.0, "word_score": -1.0}
FINETUNED = ("wer", "accuracy", "correlation")


def block(text: str) -> int | Literal["all"]:
    """The number of a block, or "all"."""
    try:
        return "all" if text == "all" else positive(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}, or all") from None


def add_evaluate(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "probe",
        choices=["knn", "ridge", "logistic", "linear", "attentive", *FINETUNED],
        help=PROBE_HELP,
    )
    command.add_argument("run", type=Path, metavar="RUN", help=SOURCE_HELP)
    command.add_argument(
        "--gallery",
        "--train",
        dest="train",
        metavar="SET",
        help="labelled shard set that the probe is fitted on; of knn, the set of the neighbours",
    )
    command.add_argument(
        "--test", required=True, nargs="+", metavar="SET", help="labelled shard sets to score"
    )
    command.add_argument(
        "--label",
        metavar="COLUMN",
        help="the column with the label (default: label; of a fine-tuned model, as in training)",
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
    add_beam(command)


def add_beam(command: argparse.ArgumentParser) -> None:
    beam = command.add_argument_group("beam search (wer), in addition to greedy decoding")
    beam.add_argument(
        "--lm", type=Path, metavar="FILE", help="n-gram language model, ARPA or KenLM"
    )
    beam.add_argument(
        "--words",
        type=Path,
        metavar="FILE",
        help="lexicon: a word per line, made of the letters",
    )
    beam.add_argument(
        "--beam", type=positive, metavar="N", help="hypotheses kept after each token (default: 50)"
    )
    beam.add_argument(
        "--lm-weight", type=float, metavar="X", help="factor of its log-probabilities (default: 2)"
    )
    beam.add_argument(
        "--word-score", type=float, metavar="X", help="score added for each word (default: -1)"
    )


def add_modality(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--modality",
        metavar="NAME",
        help="the modality of the encoder; needed if the run has several",
    )


def add_features(command: argparse.ArgumentParser) -> None:
    command.add_argument("source", type=Path, metavar="SOURCE", help=SOURCE_HELP)
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

    refuse_unused(arguments)
    if arguments.probe in FINETUNED:
        table, summary = evaluate.run_finetuned(
            arguments.run,
            kind=arguments.probe,
            tests=arguments.test,
            label=arguments.label or "",
            beam=beam_of(arguments),
        )
    else:
        table, summary = evaluate.run_probe(
            arguments.run,
            probe=arguments.probe,
            train=arguments.train,
            tests=arguments.test,
            label=arguments.label or "label",
            weights=arguments.weights,
            layer=arguments.layer,
            modality=arguments.modality,
            compare=arguments.compare,
        )
    print(table)
    given = {name: value for name, value in vars(arguments).items() if name != "command"}
    print(evaluate.as_json(summary, evaluate.record(arguments.run, summary, given)))
    return exit_codes.FINISHED


def refuse_unused(arguments: argparse.Namespace) -> None:
    """Raises UserError for options that the chosen evaluation does not have, and for a missing
    one."""
    kind = arguments.probe
    of_probes = {
        "--train": arguments.train is not None,
        "--layer": arguments.layer is not None,
        "--compare": arguments.compare,
        "--weights": arguments.weights != "student",
        "--modality": arguments.modality is not None,
    }
    of_beams = {
        f"--{name.replace('_', '-')}": getattr(arguments, name) is not None for name in BEAM_OPTIONS
    }
    unused = of_beams if kind not in FINETUNED else of_probes
    if kind in FINETUNED and kind != "wer":
        unused = {**of_probes, **of_beams}
    for option, given in unused.items():
        if given:
            raise UserError(f"{option}: is not an option of `evaluate {kind}`; omit it")
    if repeated := [each for i, each in enumerate(arguments.test) if each in arguments.test[:i]]:
        raise UserError(f"--test: {repeated[0]} is given twice")
    if arguments.lm_weight is not None and arguments.lm is None:
        raise UserError("--lm-weight: has no effect without a language model; give one with --lm")
    if kind not in FINETUNED and arguments.train is None:
        raise UserError(f"--train: must be given for `evaluate {kind}`: a labelled shard set")


BEAM_OPTIONS = ("lm", "words", *BEAM_DEFAULTS)


def beam_of(arguments: argparse.Namespace) -> Callable[[Sequence[str]], Any] | None:
    """Makes the decoder that the options describe; None without any of them."""
    if all(getattr(arguments, name) is None for name in BEAM_OPTIONS):
        return None
    from d2v_ds import ctc

    words = None if arguments.words is None else ctc.read_words(arguments.words)
    return lambda labels: ctc.BeamSearch(
        labels,
        words=words,
        lm=arguments.lm,
        **{
            name: default if (given := getattr(arguments, name)) is None else given
            for name, default in BEAM_DEFAULTS.items()
        },
    )


def features_run(arguments: argparse.Namespace) -> int:
    from d2v_ds import features
    from d2v_ds.distributed.launcher import launch
    from d2v_ds.distributed.world import World

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
