"""Mozilla Common Voice: a folder of one language with clips/ and TSVs (validated.tsv, train.tsv and
others) of columns client_id, path, sentence ... (https://github.com/common-voice/cv-dataset).

SOURCE is the folder, then validated.tsv is read, or one of its TSVs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from d2v_ds.errors import UserError
from shards.family import Input, Sample
from shards.keys import make_key
from shards.speech.tables import rows
from shards.walking import AUDIO, size_of

DEFAULT = "validated.tsv"
CLIPS = "clips"
KEPT = ("age", "gender", "accents", "locale")


def read(source: Path, rejected: list[tuple[str, str]]) -> tuple[Path, Iterator[Sample]]:
    table = source / DEFAULT if source.is_dir() else source
    if not table.is_file():
        raise UserError(f"{table}: no such file, which --layout commonvoice needs")
    return table.parent, _samples(table, rejected)


def _samples(table: Path, rejected: list[tuple[str, str]]) -> Iterator[Sample]:
    for number, row in rows(table, "path"):
        name = row["path"]
        if not name:
            rejected.append((f"{table.name}, line {number}", "names no clip"))
            continue
        if not name.lower().endswith(AUDIO):
            name += ".mp3"  # as in releases before version 5
        path = f"{CLIPS}/{name}"
        columns = {column: row[column] for column in KEPT if row.get(column)}
        columns |= {"text": row.get("sentence", ""), "speaker": row.get("client_id", "")}
        size = size_of(table.parent / path)
        yield Sample(make_key(os.path.splitext(name)[0]), (Input(path),), columns, size)
