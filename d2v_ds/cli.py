"""The command `d2v-ds`: parses the command line and calls the rest of the package.

A command imports torch only if it needs it. `train` checks the configuration before that.
"""

from __future__ import annotations

import argparse
import os
import subprocess
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

from d2v_ds import __version__, exit_codes, recipes
from d2v_ds.arguments import positive, size
from d2v_ds.cli_evaluate import add_evaluate, add_features, evaluate_run, features_run
from d2v_ds.distributed import signals
from d2v_ds.errors import Superseded, UserError
from d2v_ds.export import arguments as exporting
from d2v_ds.run import logs

DESCRIPTION = """\
Pre-trains data2vec 1.0 and 2.0 on speech, images and text with DeepSpeed ZeRO.
Settings are given as key.path=value; `d2v-ds settings` describes all of them."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    logs.open_standard_streams()
    arguments = parse(argv)
    trains = arguments.command in (train_run, finetune_run)
    if trains and argv is None and not arguments.check:  # not in a program that calls this
        signals.hold()
    try:
        code: int = arguments.command(arguments)
        return code
    except UserError as error:
        logs.say(f"d2v-ds: {error}")
        return exit_codes.BAD_INPUT
    except Superseded as error:
        logs.say(f"d2v-ds: {error}")
        return exit_codes.FAILURE
    except KeyboardInterrupt:
        if not trains:
            raise
        logs.say("d2v-ds: interrupted before the first step; the run folder is as it was")
        return exit_codes.INTERRUPTED
    except BrokenPipeError:  # the reader has closed the pipe, as in `... | head`
        if trains:
            raise
        return exit_codes.FINISHED
    finally:
        logs.close_standard_streams()


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses the command line; unlike argparse, accepts settings and options in any order."""
    top = parser()
    arguments, rest = top.parse_known_args(argv)
    settings = [word for word in rest if "=" in word and not word.startswith("-")]
    if settings != rest or (settings and not hasattr(arguments, "overrides")):
        top.parse_args(argv)  # reports the error and exits
    if settings:
        arguments.overrides += settings
    return arguments


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="d2v-ds",
        description=DESCRIPTION,
        epilog=exit_codes.table(exit_codes.OF_D2V_DS),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=__version__)
    commands = top.add_subparsers(required=True, metavar="COMMAND", title="commands")

    def add(
        name: str, function: Callable[[argparse.Namespace], int], text: str, details: str = ""
    ) -> argparse.ArgumentParser:
        description = f"{text[0].upper()}{text[1:]}. {details}"
        command = commands.add_parser(name, help=text, description=description)
        command.set_defaults(command=function)
        return command

    add("recipes", list_recipes, "list the recipes")
    add_settings(
        add(
            "settings",
            show_settings,
            "describe the settings",
            "Prints the type or the allowed values, the default and the meaning of each setting. "
            "Without PATH, prints all settings.",
        )
    )
    add_show(
        add(
            "show",
            show_run,
            "show parameters, memory and batch split of a run, without data or a GPU",
            "Prints the resolved configuration, the parameters by part, the memory per rank for "
            "each ZeRO stage, and the split of the batch.",
        )
    )
    add_train(
        add(
            "train",
            train_run,
            "pre-train, or resume a run",
            "Resumes automatically if the run folder has a checkpoint. To stop a run: Ctrl-C, "
            "SIGTERM, SIGUSR2, or a file STOP in the run folder.",
        )
    )
    add_train(
        add(
            "finetune",
            finetune_run,
            "fine-tune an encoder on labelled shards, or resume",
            "RECIPE is a recipe of fine-tuning, and init=PATH names the encoder: a run folder, a "
            "checkpoint, an exported folder, a Hugging Face folder, a fairseq .pt or a BEiT .pth. "
            "All other options are those of train.",
        )
    )
    status = add(
        "status",
        show_status,
        "show the state of a run",
        "Prints the step, the time left, the last checkpoint, restarts and the slowest rank. "
        "Reads only the run folder, so it also works while the run trains.",
    )
    status.add_argument("run", type=Path, metavar="RUN", help="the run folder")
    add_evaluate(
        add(
            "evaluate",
            evaluate_run,
            "probe a frozen encoder, or score a fine-tuned model, on labelled shard sets",
            "Prints a table and, as the last line, a JSON summary, and records both in the run.",
        )
    )
    add_features(
        add(
            "features",
            features_run,
            "write the features of a shard set",
            "Writes one file for each shard. Finished shards are skipped, so the same command "
            "resumes.",
        )
    )
    exporting.add_export(add("export", exporting.run, exporting.EXPORT, exporting.EXPORT_DETAILS))
    exporting.add_import(add("import", exporting.run, exporting.IMPORT, exporting.IMPORT_DETAILS))
    return top


def add_settings(command: argparse.ArgumentParser) -> None:
    shown = command.add_mutually_exclusive_group()
    shown.add_argument(
        "path",
        nargs="?",
        default="",
        metavar="PATH",
        help="a section or setting: optim, optim.lr, modality.speech.mask",
    )
    shown.add_argument(
        "--markdown", action="store_true", help="print the content of docs/configuration.md"
    )


def add_run(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "source", metavar="RECIPE|FILE", help="the name of a recipe, or a YAML file"
    )
    command.add_argument(
        "overrides",
        nargs="*",
        metavar="key.path=value",
        help="settings to change; the value is read as YAML",
    )


def add_show(command: argparse.ArgumentParser) -> None:
    add_run(command)
    command.add_argument(
        "--ranks", type=positive, default=8, metavar="N", help="the number of ranks (default: 8)"
    )
    command.add_argument(
        "--gpu-memory",
        type=size,
        metavar="SIZE",
        help="memory per GPU, for example 80GiB; adds the smallest ZeRO stage and the largest "
        "micro-batch that fit",
    )
    command.add_argument(
        "--measure",
        action="store_true",
        help="run the largest micro-batch on this machine instead of estimating its memory",
    )


def add_train(command: argparse.ArgumentParser) -> None:
    add_run(command)
    command.add_argument(
        "--nproc",
        type=positive,
        metavar="N",
        help="ranks to start on this machine if no launcher has started them (default: one per "
        "GPU, or one on the CPU)",
    )
    command.add_argument(
        "--new", action="store_true", help="refuse to resume a run folder that has checkpoints"
    )
    command.add_argument(
        "--allow",
        action="append",
        default=[],
        metavar="KEY",
        help="a setting or section that may differ from the checkpoint's; may be repeated",
    )
    command.add_argument(
        "--check",
        action="store_true",
        help="only check the settings, the shard sets and the run folder, and print its path",
    )


# ------------------------------------------------------------------------------------ the commands


def list_recipes(arguments: argparse.Namespace) -> int:
    width = 2 + max(map(len, recipes.RECIPES))
    for number, (title, group) in enumerate(recipes.GROUPS.items()):
        print("\n" * (number > 0) + f"{title} (d2v-ds {('train', 'finetune')[number]}):")
        for name in group:
            print(f"  {name:<{width}}{recipes.summary(name)}")
    return exit_codes.FINISHED


def show_settings(arguments: argparse.Namespace) -> int:
    from d2v_ds.config import reference

    if arguments.markdown:
        print(reference.as_markdown(), end="")
    else:
        print(reference.as_text(arguments.path))
    return exit_codes.FINISHED


def show_run(arguments: argparse.Namespace) -> int:
    config = recipes.load(arguments.source, arguments.overrides)
    if config.finetune.task != "none":
        raise UserError(
            f"{arguments.source}: show describes pre-training only; `d2v-ds finetune "
            f"{arguments.source} ... --check` checks a configuration of fine-tuning"
        )
    if arguments.measure:
        # Silences the start-up log of torch's profiler, which measures memory on a CPU.
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    from d2v_ds import show

    print(show.describe(config, arguments.ranks, arguments.gpu_memory, measure=arguments.measure))
    return exit_codes.FINISHED


def train_run(arguments: argparse.Namespace) -> int:
    return run_task("train", "d2v_ds.pretrain:Pretrain", arguments)


def finetune_run(arguments: argparse.Namespace) -> int:
    return run_task("finetune", "d2v_ds.finetune:Finetune", arguments)


def run_task(command: str, task: str, arguments: argparse.Namespace) -> int:
    """Trains a task, MODULE:CLASS, whose module needs torch."""
    from d2v_ds.run import preflight

    config = recipes.load(arguments.source, arguments.overrides)
    ranks = launched_ranks()
    if ranks is not None and arguments.nproc is not None and not arguments.check:
        raise UserError(f"--nproc: a launcher has already started {ranks} ranks. Omit --nproc.")
    ranks = arguments.nproc or ranks or gpus() or 1
    if (config.finetune.task != "none") != (command == "finetune"):
        raise UserError(
            f"{arguments.source}: is a configuration of "
            + ("fine-tuning" if command == "train" else "pre-training")
            + f"; use `d2v-ds {'finetune' if command == 'train' else 'train'}`"
        )
    preflight.check(config, ranks)
    module, _, name = task.partition(":")
    if arguments.check:
        getattr(import_module(module), name).resolve(config)  # what needs torch
        print(config.run_dir)
        return exit_codes.FINISHED
    if launched_ranks() is None and ranks > 1:
        from d2v_ds.distributed.launcher import launch

        code = launch(ranks, train_arguments(command, arguments))
        signals.ignore()
        return code

    from d2v_ds.distributed.world import World
    from d2v_ds.train import train

    return train(
        getattr(import_module(module), name),
        config,
        World.from_environment(),
        new=arguments.new,
        allow=tuple(arguments.allow),
    )


def train_arguments(command: str, arguments: argparse.Namespace) -> list[str]:
    """The command line of one rank."""
    allow = [word for key in arguments.allow for word in ("--allow", key)]
    new = ["--new"] * arguments.new
    return [command, *new, *allow, arguments.source, *arguments.overrides]


def launched_ranks() -> int | None:
    """The number of ranks that a launcher started; None without a launcher. The same as
    World.from_environment, which needs torch."""
    for name in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        if os.environ.get(name, "").isdecimal():
            return int(os.environ[name])
    return None


def gpus() -> int:
    """The number of GPUs of this machine, without importing torch; 0 if there is no driver."""
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
    return exit_codes.FINISHED
