"""Converts text in tests, and reads the documents of a set back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from d2v_ds.data.checks import Finding
from d2v_ds.data.shard_format import open_set
from d2v_ds.loader.reading import read_samples
from d2v_ds.modalities.text import read_ids
from shards import samples
from shards.cli import main
from shards.layout import AUTO, find
from shards.text import LAYOUTS
from shards.text.layout import TextLayout, TextOptions
from shards.text.tokenizer import Tokenizer

MODEL = samples.path("text") / "tokenizer.model"
TOKENIZER = Tokenizer.load(MODEL)


def convert(*arguments: object, tokenizer: Path = MODEL) -> int:
    return main(["text", *map(str, arguments), "--tokenizer", str(tokenizer), "-j", "1"])


def open_text(source: Path, document: Any = "line", **options: Any) -> TextLayout:
    return find(LAYOUTS, AUTO, source).open(source, TextOptions(document, **options))


def read(layout: TextLayout) -> tuple[list[str], list[Finding]]:
    """(documents, findings) of a corpus."""
    findings: list[Finding] = []
    found = [
        item.content
        for sample in layout.samples(findings)
        for item in layout.read(sample, findings)
    ]
    return found, findings


def found_in(source: Path, document: Any = "line", **options: Any) -> tuple[list[str], list[Any]]:
    """(documents, (name, kind) of the findings) of a corpus."""
    texts, findings = read(open_text(source, document, **options))
    return texts, [(one.name, one.kind) for one in findings]


def documents(folder: Path, tokenizer: Tokenizer = TOKENIZER) -> list[str]:
    """The text of a set, split at eos."""
    shards, ids = open_set(folder, "text"), list[int]()
    for _, sample in read_samples(shards, ("npy", "u16", "u32")):
        ids += read_ids(sample).tolist()
    result, start = [], 0
    for end, i in enumerate(ids):
        if i == tokenizer.eos_id:
            result.append(tokenizer.decode(ids[start:end]))
            start = end + 1
    assert start == len(ids)
    return result


def labelled(folder: Path) -> list[dict[str, Any]]:
    """The .json of each sample."""
    shards = open_set(folder, "text")
    return [json.loads(sample["json"]) for _, sample in read_samples(shards, ("npy", "json"))]


def about(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "index.json").read_bytes())
    return found
