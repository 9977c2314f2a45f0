"""The command d2v-shards: converts corpora to shard sets, checks and describes sets.

Parses and calls. Bad input ends with one line and exit code 2; nothing is imported that is not
needed, so --help and mistakes answer at once.

A family of corpora is a module shards.NAME and a line in FAMILIES. The module offers DESCRIPTION,
add_arguments(parser) for its own options, and read(arguments) -> Corpus; it imports nothing heavy
until `read` is called. What all families share is here and in core.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from d2v_ds.data.shard_format import INDEX_FILE, PLAN_FILE
from d2v_ds.errors import UserError
from d2v_ds.modalities import REGISTRY
from shards import arguments as types

FAMILIES = {
    "speech": "convert recordings",
    "images": "convert images",
    "text": "convert text",
}
# Commands of their own: modules with DESCRIPTION, add_arguments(parser), run(arguments) -> code.
COMMANDS = {"tokenizer": "train a sentencepiece model"}


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 1 failure or problems found, 2 bad input, 130 interrupted."""
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except UserError as error:
        print(f"d2v-shards: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # nobody reads on, as in `d2v-shards stats SET | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:  # a full disk, no permission to write
        print(f"d2v-shards: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("d2v-shards: interrupted; the same command goes on from here", file=sys.stderr)
        return 130


def _convert(arguments: argparse.Namespace) -> int:
    from shards import core, estimate
    from shards.plan import Choice, make_plans
    from shards.workers import Workers

    out: Path = arguments.out
    if out.resolve() == arguments.source.resolve():
        raise UserError(f"{out}: is both SOURCE and OUT; name another folder for OUT")
    if arguments.split and (out / INDEX_FILE).exists():
        raise UserError(f"{out}: is a shard set; name a new folder for the splits")
    if arguments.split_by and not arguments.split:
        raise UserError("--split-by: says by what to split, --split into what; give both")
    task = arguments.task or types.task_of_slurm()
    corpus = import_module(f"shards.{arguments.family}").read(arguments)
    choice = Choice(
        arguments.seed,
        arguments.shard_size,
        arguments.only,
        arguments.leave_out,
        arguments.split,
        arguments.split_by,
    )
    if arguments.dry_run:
        for line in estimate.estimate(make_plans(corpus, choice), corpus.converter, arguments.jobs):
            print(line)
        return 0
    with Workers(arguments.jobs) as workers:
        samples = workers.start_in_time(corpus.samples, type(corpus.converter).__module__)
        plans = make_plans(dataclasses.replace(corpus, samples=samples), choice)
        for name, plan in plans.items():
            shards = core.convert(
                plan, corpus.converter, out / name, workers, arguments.max_bad, task
            )
            if shards:
                print(core.describe(shards))
                _tell_left_out(shards.root)
    if task[1] > 1:
        i, n = task
        print(f"{out}: task {i} of {n} is done; after all, d2v-shards merge it")
    return 0


def _tell_left_out(out: Path) -> None:
    from shards.core import QUARANTINE_FILE

    about = json.loads((out / INDEX_FILE).read_bytes())
    if about["quarantined"]:
        print(
            f"{about['quarantined']} of {about['inputs']} inputs were left out, with the reason in "
            f"{out / QUARANTINE_FILE}"
        )


def _merge(arguments: argparse.Namespace) -> int:
    from shards import core

    out: Path = arguments.set
    splits = sorted(
        folder
        for folder in (out.iterdir() if out.is_dir() else ())
        if (folder / PLAN_FILE).exists() or (folder / INDEX_FILE).exists()
    )
    for folder in splits or [out]:
        shards = core.merge(folder, arguments.max_bad)
        print(core.describe(shards))
        _tell_left_out(folder)
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from shards.verify import NOTE, verify

    problems = 0
    for line in verify(arguments.set, arguments.jobs):
        problems += not line.startswith(NOTE)
        print(line, flush=True)
    print(f"{arguments.set}: {problems or 'no'} problem{'' if problems == 1 else 's'}")
    return 1 if problems else 0


def _index(arguments: argparse.Namespace) -> int:
    from shards.core import describe
    from shards.index import index

    shards = index(arguments.source, arguments.out, arguments.modality, arguments.checksums,
                   arguments.jobs)  # fmt: skip
    print(describe(shards))
    _tell_left_out(shards.root)
    return 0


def _stats(arguments: argparse.Namespace) -> int:
    from shards import stats

    tables = stats.describe(arguments.set)
    print(stats.as_markdown(tables) if arguments.markdown else stats.as_text(tables))
    return 0


# ---------------------------------------------------------------------------------------- arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "d2v-shards", description="Convert corpora to shard sets, check and describe sets."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for family, purpose in FAMILIES.items():
        module = import_module(f"shards.{family}")
        command = commands.add_parser(family, help=purpose, description=module.DESCRIPTION)
        command.add_argument("source", type=Path, metavar="SOURCE", help=module.SOURCE)
        command.add_argument("out", type=Path, metavar="OUT", help="a new folder for the set")
        module.add_arguments(command.add_argument_group(f"of {family}"))
        _add_choice(command)
        _add_running(command)
        command.set_defaults(run=_convert, family=family)
    for name, purpose in COMMANDS.items():
        module = import_module(f"shards.{name}")
        command = commands.add_parser(name, help=purpose, description=module.DESCRIPTION)
        module.add_arguments(command)
        command.set_defaults(run=module.run)

    merge = commands.add_parser("merge", help="finish a set whose tasks (--task) are done")
    merge.add_argument("set", type=Path, metavar="OUT", help="the folder that the tasks wrote")
    _add_max_bad(merge)
    merge.set_defaults(run=_merge)

    index = commands.add_parser(
        "index",
        help="make an index for WebDataset tars that others made",
        description="Makes a shard set of WebDataset tars as they are: reads their headers, writes "
        "an index, copies nothing.",
    )
    index.add_argument("source", type=Path, metavar="TARS", help="a folder with tars, or one tar")
    index.add_argument(
        "out", type=Path, metavar="OUT", nargs="?", help="a folder for the index (beside the tars)"
    )
    index.add_argument(
        "--modality", choices=tuple(REGISTRY), default="", help="(detected from the members)"
    )
    index.add_argument(
        "--checksums",
        action="store_true",
        help="read all of the tars, so that damage is seen later",
    )
    add_jobs(index)
    index.set_defaults(run=_index)

    verify = commands.add_parser("verify", help="check every shard, checksum and sample of a set")
    verify.add_argument("set", type=Path, metavar="SET")
    add_jobs(verify)
    verify.set_defaults(run=_verify)

    stats = commands.add_parser("stats", help="counts, hours, lengths and labels of a set")
    stats.add_argument("set", type=Path, metavar="SET")
    stats.add_argument("--markdown", action="store_true", help="as a data card")
    stats.set_defaults(run=_stats)
    return parser


def _add_choice(parser: argparse.ArgumentParser) -> None:
    """What of the corpus, in which order, in which sets."""
    group = parser.add_argument_group("sets")
    group.add_argument(
        "--split",
        type=types.splits,
        metavar="NAME=SHARE,...",
        help="several sets OUT/NAME, as in train=98,valid=1,test=1; by a hash of the key, so that "
        "samples stay where they are when the corpus grows",
    )
    group.add_argument(
        "--split-by",
        default="",
        metavar="COLUMN",
        help="split by a hash of this column instead: speaker, say, so that each is in one set",
    )
    group.add_argument(
        "--only",
        type=Path,
        metavar="FILE",
        help="take the keys or paths that FILE lists, a line each",
    )
    group.add_argument(
        "--except",
        type=Path,
        metavar="FILE",
        dest="leave_out",
        help="leave out the keys or paths that FILE has a line of",
    )
    group.add_argument(
        "--shard-size",
        type=types.size,
        default="256MB",
        help="of a shard's inputs, at most about this (%(default)s)",
    )
    group.add_argument(
        "--seed",
        type=types.number(int, 0, 2**63),
        default=0,
        help="of the samples' order (%(default)s)",
    )


def _add_running(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("running")
    group.add_argument(
        "--dry-run",
        action="store_true",
        help="tell what would be made, how large and how long; write nothing",
    )
    _add_max_bad(group)
    group.add_argument(
        "--task",
        type=types.task,
        metavar="I/N",
        help="of an array job: every N-th shard from the I-th on, I from 0; then merge (default: "
        "from SLURM_ARRAY_TASK_ID)",
    )
    add_jobs(group)


def _add_max_bad(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--max-bad",
        type=types.share,
        default="1%",
        help="stop when more of the inputs are unusable (%(default)s)",
    )


def add_jobs(parser: argparse._ActionsContainer) -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parser.add_argument(
        "-j",
        "--jobs",
        type=types.number(int, 1, 4096),
        default=cores,
        help="processes (%(default)s, one a core)",
    )


if __name__ == "__main__":
    sys.exit(main())
