"""LibriSpeech and Libri-Light trees.

SPLIT/SPEAKER/CHAPTER/SPEAKER-CHAPTER-UTTERANCE.flac, beside them SPEAKER-CHAPTER.trans.txt
with a line `SPEAKER-CHAPTER-UTTERANCE TEXT` each      (https://www.openslr.org/12)
SIZE/SPEAKER/BOOK/NAME.flac, beside each NAME.json with "speaker"
(https://github.com/facebookresearch/libri-light/blob/main/data_preparation/README.md)
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

from d2v_ds.errors import UserError
from shards.family import Input, Sample
from shards.keys import make_key
from shards.walking import AUDIO, folders, size_of

TRANSCRIPTS = ".trans.txt"
KEPT = ("speaker", "snr")  # of Libri-Light's JSON, which is long


def is_one(folder: Path, names: list[str]) -> bool:
    """Whether the first folder with recordings looks like it."""
    if any(name.endswith(TRANSCRIPTS) for name in names):
        return True
    stems = {os.path.splitext(n)[0] for n in names if n.lower().endswith(AUDIO)}
    described = [name for name in names if name.endswith(".json") and name[:-5] in stems]
    return bool(described) and "speaker" in _description(folder / described[0])


def read(source: Path, rejected: list[tuple[str, str]]) -> tuple[Path, Iterator[Sample]]:
    if not source.is_dir():
        raise UserError(f"{source}: is no folder, which --layout librispeech needs")
    return source, _samples(source, rejected)


def _samples(root: Path, rejected: list[tuple[str, str]]) -> Iterator[Sample]:
    number = 0
    for place, names in folders(root):
        folder = Path(place)
        texts = _transcripts(folder, names, root, rejected)
        for name in names:
            stem, extension = os.path.splitext(name)
            if extension.lower() not in AUDIO:
                continue
            number += 1
            path = os.path.relpath(folder / name, root)
            columns = _columns(folder, stem, names)
            if stem in texts:
                columns["text"] = texts.pop(stem)
            key = make_key(os.path.splitext(path)[0])
            yield Sample(key, (Input(path),), columns, size_of(folder / name))
        for stem in texts:
            where = os.path.relpath(folder / stem, root)
            rejected.append((where, "has a transcript and no recording"))
    if not number:
        raise UserError(f"{root}: has no recordings as LibriSpeech or Libri-Light lays them out")


def _transcripts(
    folder: Path, names: list[str], root: Path, rejected: list[tuple[str, str]]
) -> dict[str, str]:
    texts: dict[str, str] = {}
    for name in names:
        if not name.endswith(TRANSCRIPTS):
            continue
        lines = (folder / name).read_bytes().decode("utf-8-sig", "replace").splitlines()
        for number, line in enumerate(lines, start=1):
            stem, _, text = line.strip().partition(" ")
            if not stem:
                continue
            if "\ufffd" in text or not text.strip():
                where = f"{os.path.relpath(folder / name, root)}, line {number}"
                rejected.append((where, "is no `NAME TEXT` in UTF-8; its recording has no text"))
            else:
                texts[stem] = text.strip()
    return texts


def _columns(folder: Path, stem: str, names: list[str]) -> dict[str, object]:
    ids = stem.split("-")
    if len(ids) == 3 and all(part.isdigit() for part in ids):
        return {"speaker": ids[0], "chapter": ids[1]}
    if f"{stem}.json" in names:
        about = _description(folder / f"{stem}.json")
        return {name: about[name] for name in KEPT if name in about}
    return {}


def _description(path: Path) -> dict[str, object]:
    try:
        about = json.loads(path.read_bytes())
    except (OSError, ValueError):  # it is not needed
        return {}
    return about if isinstance(about, dict) else {}
