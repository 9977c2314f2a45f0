"""Manifests of fairseq: the first line is the root folder, every other line is PATH<TAB>FRAMES.

train.wrd (words) and train.ltr (`H E L L O | Y O U |`) next to train.tsv, if they exist, hold one
line per recording (https://github.com/facebookresearch/fairseq/tree/main/examples/wav2vec).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path

from d2v_ds.data.checks import Finding
from d2v_ds.errors import UserError
from shards.family import Input, Sample
from shards.keys import make_key
from shards.speech.layout import SpeechLayout
from shards.speech.rows import Spelling
from shards.tables import header, lines_of
from shards.walking import size_of


class Fairseq(SpeechLayout):
    name = "fairseq"
    help = "fairseq manifest (.tsv), with .wrd or .ltr transcripts next to it"
    takes = "file"

    @classmethod
    def recognises(cls, source: Path) -> bool:
        first = header(source)
        if len(first) != 1 or first[0] in ("", "path"):
            return False
        return first[0].startswith("/") or _is_folder(source.parent / first[0])

    @classmethod
    def open(cls, source: Path, options: None) -> Fairseq:
        layout = super().open(source, options)
        _, first = next(lines_of(source), (1, ""))
        root = source.parent / first
        if not first or not _is_folder(root):
            raise UserError(
                f"{source}: its first line must be the folder of the recordings; there is no "
                f"folder {first!r} on this machine"
            )
        return replace(layout, root=root)

    def samples(self, findings: list[Finding]) -> Iterator[Sample]:
        lines = lines_of(self.source)
        next(lines)
        labels = {
            kind: self.source.with_suffix(f".{kind}")
            for kind in ("wrd", "ltr")
            if self.source.with_suffix(f".{kind}").is_file()
        }
        texts = [lines_of(path) for path in labels.values()]
        empty, listed, spelling = True, set[int](), Spelling(self.root)
        for row in zip_longest(lines, *texts):
            empty = False
            if None in row:
                files = ", ".join(path.name for path in (self.source, *labels.values()))
                raise UserError(
                    f"{self.source.parent}: {files} must have one line per recording, but their "
                    "numbers of lines differ"
                )
            (number, line), *words = row
            path, tab, frames = line.partition("\t")
            if not path or (tab and not frames.strip().isdigit()):
                where = f"{self.source.name}, line {number}"
                findings.append(Finding(where, "is not PATH, TAB, FRAMES", "row"))
                continue
            identity = hash(spelling.usual(path))
            if identity in listed:
                where = f"{self.source.name}, line {number}"
                findings.append(Finding(where, f"lists {path} again", "duplicate"))
                continue
            listed.add(identity)
            columns = {}
            for kind, (_, text) in zip(labels, words, strict=True):
                if kind == "wrd":
                    columns["text"] = text.strip()
                else:
                    columns["letters"] = text.strip()
                    columns.setdefault("text", "".join(text.split()).replace("|", " ").strip())
            size = size_of(self.root / path)
            yield Sample(make_key(os.path.splitext(path)[0]), (Input(path),), columns, size)
        if empty:
            raise UserError(f"{self.source}: lists no recordings, it has only the root folder")


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):  # the name is too long, or has a NUL character
        return False
