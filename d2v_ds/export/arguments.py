"""The commands `d2v-ds export` and `d2v-ds import`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from d2v_ds import exit_codes

if TYPE_CHECKING:
    from d2v_ds.export.verify import Found
    from d2v_ds.export.writer import Content

EXPORT = "export a trained encoder to Hugging Face transformers"
EXPORT_DETAILS = (
    "Writes safetensors, configuration, preprocessors and a model card. Data2vec 1.0 loads in the "
    "classes of transformers, other models with trust_remote_code=True. A fresh process loads the "
    "result with transformers and compares it; a relative difference above 1e-5 is an error."
)
IMPORT = "convert weights of other implementations to a folder that d2v_ds reads"
IMPORT_DETAILS = "Writes the same folder as `d2v-ds export`."


def add_export(command: argparse.ArgumentParser) -> None:
    add_common(command)
    command.set_defaults(needs_tokenizer=True)


def add_import(command: argparse.ArgumentParser) -> None:
    add_common(command)
    command.set_defaults(needs_tokenizer=False)


def add_common(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "source",
        type=Path,
        metavar="SOURCE",
        help="a run folder, a checkpoint, or weights of another implementation",
    )
    command.add_argument("out", type=Path, metavar="OUT", help="the folder to write")
    command.add_argument(
        "--weights",
        choices=["student", "teacher"],
        default="student",
        help="the weights to write (default: student)",
    )
    command.add_argument(
        "--modality", default="", metavar="NAME", help="of a joint model, only this modality"
    )
    command.add_argument(
        "--tokenizer",
        type=Path,
        metavar="MODEL",
        help="the sentencepiece model or tokenizer.json of a text encoder (default: the copy in "
        "the run folder)",
    )
    command.add_argument(
        "--license", default="", metavar="NAME", help="licence of the weights, for the model card"
    )
    command.add_argument(
        "--no-verify",
        action="store_true",
        help="do not load the result with transformers, which then need not be installed",
    )


def run(arguments: argparse.Namespace) -> int:
    from d2v_ds.export.verify import VerificationFailed
    from d2v_ds.export.writer import Options, export
    from d2v_ds.weights import open_weights

    options = Options(
        weights=arguments.weights,
        modality=arguments.modality,
        tokenizer=arguments.tokenizer,
        license=arguments.license,
        verify=not arguments.no_verify,
        needs_tokenizer=arguments.needs_tokenizer,
    )
    try:
        content, found = export(open_weights(arguments.source), arguments.out, options)
    except VerificationFailed as error:
        print(f"d2v-ds: {arguments.out} was not written: {error}", file=sys.stderr)
        return exit_codes.FAILURE
    print(report(arguments.out, content, found))
    return exit_codes.FINISHED


def report(out: Path, content: Content, found: Found | None) -> str:
    """What was written, and what the verification measured."""
    config = content.config
    kind = config["architectures"][0]
    if content.problems:
        kind += " with trust_remote_code=True; transformers has no class for "
        kind += ", ".join(content.problems)
    lines = [f"{out}: {len(content.tensors)} tensors, {kind}"]
    if content.missing:
        lines.append(content.missing)
    if found is None:
        return "\n".join([*lines, "not verified"])
    versions = ", ".join(f"{name} {version}" for name, version in found.versions.items())
    lines.append(f"verified with {versions}; the largest relative differences:")
    lines += [f"  {name}: features {value:.1e}" for name, value in found.model.items()]
    lines += [f"  {name}: preprocessed inputs {value:.1e}" for name, value in found.inputs.items()]
    return "\n".join(lines)
