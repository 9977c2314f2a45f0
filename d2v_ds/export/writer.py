"""Writing an export: collects its files, writes them aside, verifies them, and renames the folder.

OUT appears only when it is complete and verified. B samples, D width.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from d2v_ds.data.tokenizer_json import JSON_FILE, SENTENCEPIECE_FILE
from d2v_ds.errors import UserError
from d2v_ds.export import card
from d2v_ds.export.model import Exported, select
from d2v_ds.export.own_code import MODEL_FILES, own_config, own_tensors, source_of
from d2v_ds.export.preprocessors import (
    Files,
    as_json,
    ctc_files,
    preprocessor_files,
    tokenizer_files,
)
from d2v_ds.export.stock import stock_config, stock_problems, stock_tensors
from d2v_ds.export.text import open_tokenizer
from d2v_ds.export.tokenizer import TextTokenizer
from d2v_ds.export.verify import Found, VerificationFailed, require_transformers, verify
from d2v_ds.files import sync, temporary, write_durably
from d2v_ds.finetune.labels import LABELS_FILE
from d2v_ds.weights import Weights, Which


@dataclass(frozen=True)
class Options:
    """The options of `d2v-ds export` and `d2v-ds import`."""

    weights: Which = "student"
    modality: str = ""  # of a joint model, only this one
    tokenizer: Path | None = None  # a sentencepiece model or a tokenizer.json
    license: str = ""  # for the model card
    verify: bool = True
    needs_tokenizer: bool = True  # whether a text model without one is an error


@dataclass(frozen=True)
class Content:
    """The files of an export, by name."""

    config: dict[str, Any]  # config.json
    tensors: dict[str, Tensor]
    predictors: dict[str, Tensor]
    files: Files
    missing: str  # a sentence about files that the export lacks, or ""
    problems: list[str]  # why the classes of transformers do not fit; empty if they do


def export(found: Weights, out: Path, options: Options) -> tuple[Content, Found | None]:
    """Writes weights to the new folder `out`.

    Returns what was written and, unless options.verify is False, what the verification measured.
    Raises UserError for bad input and VerificationFailed; `out` does not exist then.
    """
    if options.verify:
        require_transformers()
    refuse_existing(out)
    exported = select(found, options.weights, options.modality, card.origin(found))
    text = text_tokenizer(found, exported, options)
    content = collect(found, exported, text, options)
    measured = None
    with written_aside(out) as folder:
        write(folder, content)
        if options.verify:
            measured = verify(folder, exported, text)
            if failures := measured.failures():
                raise VerificationFailed("; ".join(failures))
    return content, measured


def refuse_existing(out: Path) -> None:
    """Raises UserError unless `out` is free or an empty folder."""
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists():
        raise UserError(f"{out}: already exists; choose another folder or remove it")


def text_tokenizer(found: Weights, exported: Exported, options: Options) -> TextTokenizer | None:
    """The tokenizer of a model for text. Raises UserError if it is needed and missing."""
    if "text" not in exported.modality:
        if options.tokenizer:
            raise UserError(f"--tokenizer {options.tokenizer}: the export has no text modality")
        return None
    path = options.tokenizer or found.files.get(SENTENCEPIECE_FILE)
    if path is None and found.config:  # of other weights, the file is copied as it is
        path = found.files.get(JSON_FILE)
    if options.tokenizer and not options.tokenizer.is_file():
        raise UserError(
            f"{path}: no such file; give a sentencepiece model or a tokenizer.json with --tokenizer"
        )
    if path is None and options.needs_tokenizer:
        raise UserError(
            f"{found.path}: has no tokenizer.model or tokenizer.json; give the tokenizer of the "
            "training text with --tokenizer (a copy is in its shard set)"
        )
    prefix = exported.finetune.get("bos_id")  # {} before fine-tuning: no prefix
    return open_tokenizer(path, exported.modality["text"], prefix) if path else None


def collect(
    found: Weights, exported: Exported, text: TextTokenizer | None, options: Options
) -> Content:
    """All files of the export."""
    exported = exported.with_special_ids(text.special_ids if text else {})
    problems = stock_problems(exported)
    lacking: dict[str, Tensor] = {}
    if problems:
        config, tensors, code = own_config(exported), own_tensors(exported), [*MODEL_FILES]
    else:
        config, code = stock_config(exported), list[str]()
        tensors, lacking = stock_tensors(exported)
    files, more = preprocessor_files(exported)
    code += more
    if text:
        made, more = tokenizer_files(text)
        files |= made
        code += more
    elif exported.finetune.get("task") == "ctc":
        files |= ctc_files(list(exported.finetune["labels"]), label_pieces(found))
    else:
        files |= other_tokenizer(found) if "text" in exported.modality else {}
    config |= {"dtype": "float32", **label_fields(exported), "d2v_ds": exported.entry()}
    files |= {name: source_of(name) for name in code}
    files["config.json"] = as_json(config)
    files["README.md"] = card.model_card(exported, config, files, problems, options.license)
    missing = ""
    if "text" in exported.modality and "tokenizer_config.json" not in files:
        missing = "no tokenizer was found; give it with --tokenizer"
    return Content(config, tensors, {**exported.predictors, **lacking}, files, missing, problems)


def label_pieces(found: Weights) -> bytes | None:
    """The sentencepiece model of the symbols of transcripts; None if they are letters. Raises
    UserError if it is missing."""
    given = found.finetune.get("tokenizer")
    if not given:
        return None
    path = found.files.get(LABELS_FILE, Path(given))
    if not path.is_file():
        raise UserError(
            f"{found.path}: lacks {LABELS_FILE}, the sentencepiece model of its symbols; copy the "
            f"one of the training, {given}, to this name"
        )
    return path.read_bytes()


def other_tokenizer(found: Weights) -> Files:
    """The files of a tokenizer that is not sentencepiece, as the source has them."""
    names = ("tokenizer", "vocab", "merges", "special_tokens", "added_tokens")
    return {name: path.read_bytes() for name, path in found.files.items() if name.startswith(names)}


def label_fields(exported: Exported) -> dict[str, Any]:
    """The fields of config.json that describe the outputs of a classifier."""
    task, labels = exported.finetune.get("task"), list(exported.finetune.get("labels", ()))
    if task == "regression":
        return {"problem_type": "regression", "id2label": {"0": "value"}, "label2id": {"value": 0}}
    if task == "classification":
        return {
            "problem_type": "single_label_classification",
            "id2label": {str(i): label for i, label in enumerate(labels)},
            "label2id": {label: i for i, label in enumerate(labels)},
        }
    return {}


@contextlib.contextmanager
def written_aside(out: Path) -> Iterator[Path]:
    """A new folder beside `out`, which becomes `out` if no error is raised, else is removed."""
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    aside = temporary(out.absolute())
    try:
        aside.mkdir()
        yield aside
        sync(aside)
        os.replace(aside, out.absolute())  # also replaces an empty folder
        sync(out.absolute().parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def write(folder: Path, content: Content) -> None:
    """Writes the files of an export into an empty folder."""
    save(folder / "model.safetensors", content.tensors)
    if content.predictors:
        save(folder / "predictors.safetensors", content.predictors)
    for name, value in content.files.items():
        write_durably(folder / name, value)


def save(path: Path, tensors: dict[str, Tensor]) -> None:
    """fp32 tensors as a safetensors file. Views of one tensor are stored separately."""
    separate = {name: tensor.float().clone().contiguous() for name, tensor in tensors.items()}
    save_file(separate, path, metadata={"format": "pt"})
    sync(path)
