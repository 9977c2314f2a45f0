"""The command d2v-shards. Parses the command line and calls the module of the command.

Modules are imported only when they are needed, so --help and usage errors are fast. A family of
corpora is a line in FAMILIES and a module shards.NAME with

    DESCRIPTION              of --help
    LAYOUTS                  the table of its layouts (shards/layout.py)
    add_arguments(parser)    adds its own options
    read(arguments)          -> Corpus

Everything else is common to all families.
"""

from __future__ import annotations

import argparse
import dataclasses
import errno
import io
import json
import os
import sys
import textwrap
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from d2v_ds import exit_codes
from d2v_ds.data.shard_format import INDEX_FILE, PLAN_FILE
from d2v_ds.errors import UserError
from d2v_ds.modalities import REGISTRY
from d2v_ds.secrets import mask
from shards import arguments as options
from shards import layout

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

# {command: its inputs, for --help}
FAMILIES = {"speech": "recordings", "images": "images", "text": "text"}
# {command: purpose}: modules with DESCRIPTION, add_arguments(parser) and run(arguments) -> code.
COMMANDS = {"tokenizer": "train a sentencepiece model"}
HELP_WIDTH = 80
FULL = (errno.ENOSPC, errno.EDQUOT)
UNWRITABLE = (errno.EROFS, errno.ENOTDIR, errno.ENAMETOOLONG)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns an exit code of d2v_ds/exit_codes.py."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of files need not fit the encoding
        sys.stdout.reconfigure(errors="backslashreplace")
    arguments = parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except UserError as error:
        print(f"d2v-shards: {mask(str(error))}", file=sys.stderr)
        return exit_codes.BAD_INPUT
    except BrokenPipeError:  # the reader has closed the pipe; verify may have found more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return exit_codes.FAILURE
    except PermissionError as error:
        print(f"d2v-shards: {_about(error)}; correct the permissions", file=sys.stderr)
        return exit_codes.BAD_INPUT
    except OSError as error:
        full = error.errno in FULL
        more = "; free space, then run the same command to resume" if full else ""
        print(f"d2v-shards: {_about(error)}{more}", file=sys.stderr)
        return exit_codes.BAD_INPUT if full or error.errno in UNWRITABLE else exit_codes.FAILURE
    except MemoryError:
        print("d2v-shards: there is not enough memory; use fewer --jobs", file=sys.stderr)
        return exit_codes.FAILURE
    except KeyboardInterrupt:
        print("d2v-shards: interrupted; run the same command to resume", file=sys.stderr)
        return exit_codes.INTERRUPTED


def _about(error: OSError) -> str:
    """The path and the system's reason, without the number of the error."""
    reason = error.strerror or str(error)
    return f"{os.fspath(error.filename)}: {reason}" if error.filename else reason


# ----------------------------------------------------------------------------------------- commands


def _convert(arguments: argparse.Namespace) -> int:
    from shards import core, estimate
    from shards.findings import not_chosen_line
    from shards.plan import Choice, make_plans, without_out
    from shards.workers import WorkerPool

    out: Path = arguments.out
    if out.resolve() in [source.resolve() for source in arguments.source]:
        raise UserError(f"{out}: is both SOURCE and OUT; use another folder for OUT")
    if arguments.split and (out / INDEX_FILE).exists():
        raise UserError(f"{out}: is a shard set; use a new folder for the splits")
    if arguments.split_by and not arguments.split:
        raise UserError("--split-by needs --split, which defines the splits")
    task = arguments.task or options.task_of_slurm()
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
        plans = without_out(make_plans(corpus, choice), arguments.source, out)
        for line in estimate.estimate(plans, corpus.converter, arguments.jobs, arguments.max_bad):
            print(line)
        return exit_codes.FINISHED
    with WorkerPool(arguments.jobs) as pool:
        samples = pool.start_in_time(corpus.samples, type(corpus.converter).__module__)
        corpus = dataclasses.replace(corpus, samples=samples)
        plans = without_out(make_plans(corpus, choice), arguments.source, out)
        for not_chosen in filter(None, (plan.not_chosen for plan in plans.values())):
            print(not_chosen_line(not_chosen))
        for remark in {plan.remark: None for plan in plans.values() if plan.remark}:
            print(remark)
        for name, plan in plans.items():
            shards = core.convert(plan, corpus.converter, out / name, pool, arguments.max_bad, task)
            if shards:
                print(core.describe(shards))
                _report_findings(shards.root)
    if task[1] > 1:
        i, n = task
        print(
            f"{out}: task {i} of {n} has finished; when all tasks have finished, run "
            f"`d2v-shards merge {out}`"
        )
    return exit_codes.FINISHED


def _report_findings(out: Path) -> None:
    from shards.findings import report

    for line in report(out, json.loads((out / INDEX_FILE).read_bytes())):
        print(line)


def _merge(arguments: argparse.Namespace) -> int:
    from shards import core

    out: Path = arguments.set
    splits = sorted(
        folder
        for folder in (out.iterdir() if out.is_dir() else ())
        if (folder / PLAN_FILE).exists() or (folder / INDEX_FILE).exists()
    )
    core.check_splits(out, splits)
    for folder in splits or [out]:
        shards = core.merge(folder, arguments.max_bad)
        print(core.describe(shards))
        _report_findings(folder)
    return exit_codes.FINISHED


def _verify(arguments: argparse.Namespace) -> int:
    from shards.verify import NOTE, verify

    problems = 0
    for line in verify(arguments.set, arguments.jobs):
        problems += not line.startswith(NOTE)
        print(line, flush=True)
    print(f"{arguments.set}: {problems or 'no'} problem{'' if problems == 1 else 's'}")
    return exit_codes.FAILURE if problems else exit_codes.FINISHED


def _index(arguments: argparse.Namespace) -> int:
    from shards.core import describe
    from shards.index import index

    shards = index(arguments.source, arguments.out, arguments.modality, arguments.checksums,
                   arguments.jobs)  # fmt: skip
    print(describe(shards))
    _report_findings(shards.root)
    return exit_codes.FINISHED


def _stats(arguments: argparse.Namespace) -> int:
    from shards import stats

    tables = stats.describe(arguments.set)
    print(stats.as_markdown(tables) if arguments.markdown else stats.as_text(tables))
    return exit_codes.FINISHED


# ---------------------------------------------------------------------------------------- arguments


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        "d2v-shards",
        description=_wrapped(
            f"Converts corpora ({', '.join(FAMILIES)}) to shard sets, the WebDataset tars that "
            "d2v-ds trains on. Also checks, describes and indexes shard sets."
        ),
        epilog=exit_codes.table(exit_codes.OF_D2V_SHARDS),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands: Commands = result.add_subparsers(required=True, metavar="COMMAND", title="commands")
    for name, content in FAMILIES.items():
        _add_family(commands, name, content)
    for name, purpose in COMMANDS.items():
        module = import_module(f"shards.{name}")
        command = commands.add_parser(name, help=purpose, description=module.DESCRIPTION)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    _add_merge(commands)
    _add_index(commands)
    _add_verify(commands)
    _add_stats(commands)
    return result


def _wrapped(text: str) -> str:
    return textwrap.fill(text, HELP_WIDTH)


def _add_family(commands: Commands, name: str, content: str) -> None:
    module = import_module(f"shards.{name}")
    command = commands.add_parser(
        name,
        help=f"convert {content}",
        description=_wrapped(module.DESCRIPTION),
        epilog=f"{layout.help_of(module.LAYOUTS)}\n\n{exit_codes.table(exit_codes.OF_D2V_SHARDS)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options.add_sources(command, "the corpus, in one of the layouts below; can be several")
    command.add_argument("out", type=Path, metavar="OUT", help="a new folder for the shard set")
    group = command.add_argument_group(f"{name} options")
    layout.add_argument(group, module.LAYOUTS)
    module.add_arguments(group)
    options.add_choice(command)
    options.add_running(command)
    command.set_defaults(run=_convert, family=name)


def _add_merge(commands: Commands) -> None:
    merge = commands.add_parser(
        "merge",
        help="finish a set after all tasks (--task) have finished",
        description="Finishes a shard set after all tasks (--task) have finished.",
    )
    merge.add_argument("set", type=Path, metavar="OUT", help="the folder that the tasks wrote to")
    options.add_max_bad(merge)
    merge.set_defaults(run=_merge)


def _add_index(commands: Commands) -> None:
    index = commands.add_parser(
        "index",
        help="make a shard set from third-party WebDataset tars",
        description="Makes a shard set from third-party WebDataset tars without copying them: "
        "reads their headers and writes an index.",
    )
    index.add_argument("source", type=Path, metavar="TARS", help="a tar or a folder with tars")
    index.add_argument(
        "out",
        type=Path,
        metavar="OUT",
        nargs="?",
        help="a folder for the index (default: the folder of the tars)",
    )
    index.add_argument(
        "--modality",
        choices=tuple(REGISTRY),
        default="",
        help="modality of the samples (default: detected from the members)",
    )
    index.add_argument(
        "--checksums",
        action="store_true",
        help="read the tars completely and store checksums, so that later damage is detected",
    )
    options.add_jobs(index)
    index.set_defaults(run=_index)


def _add_verify(commands: Commands) -> None:
    verify = commands.add_parser(
        "verify",
        help="check every shard, checksum and sample of a set",
        description="Checks every shard of a set, compares checksums and decodes every sample.",
    )
    verify.add_argument("set", type=Path, metavar="SET", help="a shard set")
    options.add_jobs(verify)
    verify.set_defaults(run=_verify)


def _add_stats(commands: Commands) -> None:
    stats = commands.add_parser(
        "stats",
        help="show counts, hours, lengths and labels of a set",
        description="Shows counts, hours, lengths and labels of a shard set.",
    )
    stats.add_argument("set", type=Path, metavar="SET", help="a shard set")
    stats.add_argument("--markdown", action="store_true", help="print Markdown, for a data card")
    stats.set_defaults(run=_stats)


if __name__ == "__main__":
    sys.exit(main())
