"""TSV with a header line and a column `path`, relative to the manifest. The other columns become
columns of the samples."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from d2v_ds.data.checks import Finding
from d2v_ds.errors import UserError
from shards.family import Input, Sample
from shards.keys import make_key
from shards.speech.layout import SpeechLayout
from shards.tables import rows
from shards.walking import extension_of, size_of


class Manifest(SpeechLayout):
    name = "manifest"
    help = "TSV with a header line and a column `path`"
    takes = "file"

    @classmethod
    def recognises(cls, source: Path) -> bool:
        return source.is_file() and extension_of(source.name) == ".tsv"

    def samples(self, findings: list[Finding]) -> Iterator[Sample]:
        seen: set[int] = set()  # hashes instead of paths, to save memory
        for number, row in rows(self.source, "path"):
            path = row.pop("path")
            if hash(path) in seen:
                raise UserError(
                    f"{self.source}, line {number}: {path} is listed twice; remove one of the lines"
                )
            seen.add(hash(path))
            key = make_key(os.path.splitext(path)[0])
            yield Sample(key, (Input(path),), row, size_of(self.root / path))
        if not seen:
            raise UserError(f"{self.source}: lists no recordings, it has only a header line")
