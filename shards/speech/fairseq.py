"""fairseq's manifests: a first line with the root folder, then a line PATH<TAB>FRAMES each; beside
train.tsv, line by line, train.wrd (words) and train.ltr (`H E L L O | Y O U |`) where there are any
(https://github.com/facebookresearch/fairseq/tree/main/examples/wav2vec)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

from d2v_ds.errors import UserError
from shards.family import Input, Sample
from shards.keys import make_key
from shards.speech.tables import lines_of
from shards.walking import size_of


def read(source: Path, rejected: list[tuple[str, str]]) -> tuple[Path, Iterator[Sample]]:
    if not source.is_file():
        raise UserError(f"{source}: is no file, which --layout fairseq needs")
    _, first = next(lines_of(source), (1, ""))
    root = source.parent / first
    if not first or not root.is_dir():
        raise UserError(
            f"{source}: its first line must be the folder of the recordings; there is no folder "
            f"{first!r} here"
        )
    return root, _samples(source, root, rejected)


def _samples(manifest: Path, root: Path, rejected: list[tuple[str, str]]) -> Iterator[Sample]:
    lines = lines_of(manifest)
    next(lines)
    labels = {
        kind: manifest.with_suffix(f".{kind}")
        for kind in ("wrd", "ltr")
        if manifest.with_suffix(f".{kind}").is_file()
    }
    texts = [lines_of(path) for path in labels.values()]
    for row in zip_longest(lines, *texts):
        if None in row:
            files = ", ".join(path.name for path in (manifest, *labels.values()))
            raise UserError(f"{manifest.parent}: {files} have not the same number of recordings")
        (number, line), *words = row
        path, tab, frames = line.partition("\t")
        if not path or (tab and not frames.strip().isdigit()):
            rejected.append((f"{manifest.name}, line {number}", "is not PATH, TAB, FRAMES"))
            continue
        columns = {}
        for kind, (_, text) in zip(labels, words, strict=True):
            if kind == "wrd":
                columns["text"] = text.strip()
            else:
                columns["letters"] = text.strip()
                columns.setdefault("text", "".join(text.split()).replace("|", " ").strip())
        size = size_of(root / path)
        yield Sample(make_key(os.path.splitext(path)[0]), (Input(path),), columns, size)
