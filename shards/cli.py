"""The command d2v-shards: converts corpora to shard sets, checks and describes sets.

Parses and calls. Bad input ends with one line and exit code 2; nothing is imported that is not
needed, so --help and mistakes answer at once.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from d2v_ds.errors import UserError
from d2v_ds.shard_format import INDEX_FILE


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 1 failure or problems found, 2 bad input, 130 interrupted."""
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except UserError as error:
        print(f"d2v-shards: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a full disk, no permission to write
        print(f"d2v-shards: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("d2v-shards: interrupted; the same command goes on from here", file=sys.stderr)
        return 130


def _speech(arguments: argparse.Namespace) -> int:
    from shards import core, speech

    if arguments.out.resolve() == arguments.source.resolve():
        raise UserError(f"{arguments.out}: is both SOURCE and OUT; name another folder for OUT")
    plan, converter = speech.plan(
        arguments.source,
        rate=arguments.rate,
        join=arguments.join,
        join_seconds=arguments.join_seconds,
        shard_size=arguments.shard_size,
        seed=arguments.seed,
    )
    shards = core.convert(
        plan, converter, arguments.out, arguments.jobs, arguments.max_bad, arguments.task
    )
    if shards is None:
        i, n = arguments.task
        print(f"{arguments.out}: task {i} of {n} is done; after all, d2v-shards merge it")
        return 0
    hours = shards.length / shards.sample_rate / 3600
    print(
        f"{arguments.out}: {shards.samples} samples, {hours:.3f} hours, {len(shards.shards)} shards"
    )
    _tell_left_out(arguments.out)
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

    shards = core.merge(arguments.set, arguments.max_bad)
    print(f"{arguments.set}: {shards.samples} samples, {len(shards.shards)} shards")
    _tell_left_out(arguments.set)
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from shards.verify import verify

    problems = 0
    for problem in verify(arguments.set, arguments.jobs):
        problems += 1
        print(problem, flush=True)
    print(f"{arguments.set}: {problems or 'no'} problem{'' if problems == 1 else 's'}")
    return 1 if problems else 0


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
    speech = commands.add_parser(
        "speech",
        help="convert recordings",
        description="Convert a folder of wav and flac files, or the recordings that a manifest "
        "lists, to a shard set of mono 16-bit FLAC. Interrupted or killed, the same command goes "
        "on.",
    )
    speech.add_argument(
        "source",
        type=Path,
        metavar="SOURCE",
        help="a folder, or a .tsv manifest: a header line, a column `path` relative to the "
        "manifest, any other columns (label, speaker, text), which go along",
    )
    speech.add_argument("out", type=Path, metavar="OUT", help="a new folder for the set")
    speech.add_argument(
        "--rate",
        type=_number(int, 1000, 192_000),
        default=16000,
        help="frames a second (%(default)s)",
    )
    speech.add_argument(
        "--join",
        default="",
        metavar="COLUMN",
        help="join recordings that agree in this column into longer samples, without gaps",
    )
    speech.add_argument(
        "--join-seconds",
        type=_number(float, 0.1, 3600),
        default=8.0,
        help="of a joined sample (%(default)s)",
    )
    speech.add_argument(
        "--shard-size", type=_size, default="256MB", help="of a shard's inputs, at most about this"
    )
    speech.add_argument(
        "--seed", type=_number(int, 0, 2**63), default=0, help="of the samples' order (%(default)s)"
    )
    speech.add_argument(
        "--max-bad", type=_share, default="1%", help="stop when more of the inputs are unusable"
    )
    speech.add_argument(
        "--task",
        type=_task,
        default=(0, 1),
        metavar="I/N",
        help="of an array job: every N-th shard from the I-th on, I from 0; then merge",
    )
    _add_jobs(speech)
    speech.set_defaults(run=_speech)

    merge = commands.add_parser("merge", help="finish a set whose tasks (--task) are done")
    merge.add_argument("set", type=Path, metavar="OUT", help="the folder that the tasks wrote")
    merge.add_argument(
        "--max-bad", type=_share, default="1%", help="stop when more of the inputs are unusable"
    )
    merge.set_defaults(run=_merge)

    verify = commands.add_parser("verify", help="check every shard, checksum and sample of a set")
    verify.add_argument("set", type=Path, metavar="SET")
    _add_jobs(verify)
    verify.set_defaults(run=_verify)

    stats = commands.add_parser("stats", help="counts, hours, lengths and labels of a set")
    stats.add_argument("set", type=Path, metavar="SET")
    stats.add_argument("--markdown", action="store_true", help="as a data card")
    stats.set_defaults(run=_stats)
    return parser


def _add_jobs(parser: argparse.ArgumentParser) -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parser.add_argument(
        "-j",
        "--jobs",
        type=_number(int, 1, 4096),
        default=cores,
        help="processes (%(default)s, one a core)",
    )


def _number(kind: type[int] | type[float], low: float, high: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = kind(-1)
        if not low <= value <= high:
            name = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text}: expected {name} from {low} to {high}")
        return value

    return parse


def _size(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.upper())
    if not found or float(found[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text}: expected a size such as 256MB or 1GB")
    return int(float(found[1]) * 1000 ** " KMGT".index(found[2] or " "))


def _task(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or int(found[1]) >= int(found[2]):
        raise argparse.ArgumentTypeError(f"{text}: expected I/N with I from 0 to N - 1, as in 0/8")
    return int(found[1]), int(found[2])


def _share(text: str) -> float:
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a share such as 1% or 0.01")
    return value


if __name__ == "__main__":
    sys.exit(main())
