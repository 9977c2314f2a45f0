"""How corpora of speech are laid out: SOURCE -> (folder that paths are relative to, samples).

Each reader is a function of (source, rejected); inputs of which no sample can be made go into
`rejected` with the reason, while the samples are read. What a person has to mend (no such file, a
header that says something else) raises UserError.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from d2v_ds.errors import UserError
from shards.family import Input, Sample
from shards.keys import make_key
from shards.speech import commonvoice, fairseq, jsonl, librispeech, manifest, tars
from shards.walking import AUDIO, first_folder, walk

Rejected = list[tuple[str, str]]
Reader = Callable[[Path, Rejected], tuple[Path, Iterator[Sample]]]


def folder(source: Path, rejected: Rejected) -> tuple[Path, Iterator[Sample]]:
    """Every recording below a folder; links are followed, each folder visited once."""
    if not source.is_dir():
        raise UserError(f"{source}: is no folder, which --layout folder needs")
    return source, _walk(source)


def _walk(root: Path) -> Iterator[Sample]:
    others: Counter[str] = Counter()
    number = 0
    for path, name, size in walk(root):
        stem, extension = os.path.splitext(path)
        if extension.lower() in AUDIO:
            number += 1
            yield Sample(make_key(stem), (Input(path),), {}, size)
        else:
            others[extension.lower() or name] += 1
    if not number:
        found = ", ".join(f"{n} {kind}" for kind, n in others.most_common(5)) or "nothing"
        raise UserError(
            f"{root}: has no {', '.join(AUDIO[:-1])} or {AUDIO[-1]} file in it (found: {found})"
        )


LAYOUTS: dict[str, Reader] = {
    "folder": folder,
    "librispeech": librispeech.read,
    "commonvoice": commonvoice.read,
    "fairseq": fairseq.read,
    "jsonl": jsonl.read,
    "manifest": manifest.read,
    "webdataset": tars.read,
}


def recognise(source: Path) -> str:
    """The layout, by what lies there. Raises UserError when nothing does, or nothing known."""
    if source.is_dir():
        return _recognise_folder(source)
    if not source.exists():
        raise UserError(f"{source}: no such folder or manifest")
    extension = source.suffix.lower()
    if extension == ".tar":
        return "webdataset"
    if extension in (".jsonl", ".ndjson", ".json"):
        return "jsonl"
    if extension != ".tsv":
        raise UserError(
            f"{source}: is neither a folder nor a manifest (.tsv, .jsonl) nor a .tar; say with "
            "--layout what it is"
        )
    with source.open("rb") as file:
        head = file.readline(1 << 16).decode("utf-8-sig", "replace").rstrip("\r\n").split("\t")
    if {"client_id", "path", "sentence"} <= set(head):
        return "commonvoice"
    absolute = len(head) == 1 and (head[0].startswith("/") or (source.parent / head[0]).is_dir())
    return "fairseq" if absolute and head[0] and head != ["path"] else "manifest"


def _recognise_folder(source: Path) -> str:
    if (source / commonvoice.DEFAULT).is_file() and (source / commonvoice.CLIPS).is_dir():
        return "commonvoice"
    place, names = first_folder(source, (*AUDIO, ".tar"))
    extensions = {os.path.splitext(name)[1].lower() for name in names}
    if ".tar" in extensions and extensions.isdisjoint(AUDIO):
        return "webdataset"
    if librispeech.is_one(place, names):
        return "librispeech"
    return "folder"
