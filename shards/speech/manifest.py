"""TSV with a header line and a column `path`, relative to the manifest (rows.py). The other columns
become columns of the samples."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from d2v_ds.data.checks import Finding
from d2v_ds.errors import UserError
from shards.family import Sample
from shards.findings import of_error
from shards.speech.layout import SpeechLayout
from shards.speech.rows import Rows
from shards.tables import rows
from shards.walking import extension_of


class Manifest(SpeechLayout):
    name = "manifest"
    help = "TSV with a header line and a column `path`"
    takes = "file"

    @classmethod
    def recognises(cls, source: Path) -> bool:
        return source.is_file() and extension_of(source.name) == ".tsv"

    def samples(self, findings: list[Finding]) -> Iterator[Sample]:
        listed = Rows(self.root)
        number = 0
        for number, row in rows(self.source, "path"):
            try:
                yield listed.sample(row)
            except ValueError as error:
                findings.append(of_error(f"{self.source.name}, line {number}", error))
        if not number:
            raise UserError(f"{self.source}: lists no recordings, it has only a header line")
