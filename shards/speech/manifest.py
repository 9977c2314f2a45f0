"""TSV with a header line and a column `path`, relative to the manifest; other columns go along."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from d2v_ds.errors import UserError
from shards.family import Input, Sample
from shards.keys import make_key
from shards.speech.tables import rows
from shards.walking import size_of


def read(source: Path, rejected: list[tuple[str, str]]) -> tuple[Path, Iterator[Sample]]:
    if not source.is_file():
        raise UserError(f"{source}: is no file, which --layout manifest needs")
    return source.parent, _samples(source)


def _samples(manifest: Path) -> Iterator[Sample]:
    seen: set[int] = set()  # hashes, for corpora are large
    for number, row in rows(manifest, "path"):
        path = row.pop("path")
        if hash(path) in seen:
            raise UserError(f"{manifest}, line {number}: lists {path} again; once is enough")
        seen.add(hash(path))
        key = make_key(os.path.splitext(path)[0])
        yield Sample(key, (Input(path),), row, size_of(manifest.parent / path))
    if not seen:
        raise UserError(f"{manifest}: has a header line only, no recording")
