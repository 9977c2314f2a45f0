"""Mozilla Common Voice: the folder of one language with clips/ and TSVs (validated.tsv, train.tsv,
...) with columns client_id, path, sentence ... (https://github.com/common-voice/cv-dataset).

SOURCE is the folder, whose validated.tsv is converted, or one of its TSVs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from d2v_ds.data.checks import Finding
from d2v_ds.errors import UserError
from shards.family import Input, Sample
from shards.keys import make_key
from shards.speech.layout import AUDIO, SpeechLayout
from shards.tables import header, rows
from shards.walking import NOT_READ, extension_of, folders, size_of

DEFAULT = "validated.tsv"
CLIPS = "clips"
KEPT = ("age", "gender", "accents", "locale")


@dataclass(frozen=True)
class CommonVoice(SpeechLayout):
    name = "commonvoice"
    help = f"Common Voice: the folder of one language (uses {DEFAULT}) or a TSV in it"

    whole: bool = False
    """Whether SOURCE is the folder, so that clips that its table lacks and other tables are passed
    over."""

    @classmethod
    def recognises(cls, source: Path) -> bool:
        if source.is_dir():
            return (source / DEFAULT).is_file() and (source / CLIPS).is_dir()
        return {"client_id", "path", "sentence"} <= set(header(source))

    @classmethod
    def open(cls, source: Path, options: None) -> CommonVoice:
        layout = super().open(source, options)
        table = source / DEFAULT if source.is_dir() else source
        if not table.is_file():
            raise UserError(f"{table}: no such file; --layout {cls.name} needs it")
        return replace(layout, source=table, whole=source.is_dir())

    def samples(self, findings: list[Finding]) -> Iterator[Sample]:
        listed: set[int] = set()  # hashes instead of names, to save memory
        for number, row in rows(self.source, "path"):
            name = row["path"]
            where = f"{self.source.name}, line {number}"
            if not name:
                findings.append(Finding(where, "names no clip", "row"))
                continue
            if not name.lower().endswith(AUDIO):
                name += ".mp3"  # releases before version 5 omit the extension
            if hash(name) in listed:
                findings.append(Finding(where, f"lists {name} again", "duplicate"))
                continue
            listed.add(hash(name))
            path = f"{CLIPS}/{name}"
            columns = {column: row[column] for column in KEPT if row.get(column)}
            columns |= {"text": row.get("sentence", ""), "speaker": row.get("client_id", "")}
            size = size_of(self.root / path)
            yield Sample(make_key(os.path.splitext(name)[0]), (Input(path),), columns, size)
        if self.whole:
            findings += self._unlisted(listed)

    def _unlisted(self, listed: set[int]) -> Iterator[Finding]:
        """The clips that the table does not list, and all files outside of the folder of clips."""
        reason = f"{self.source.name} does not list this clip"
        for name in sorted(os.listdir(self.root / CLIPS)):
            if hash(name) not in listed:
                yield Finding(f"{CLIPS}/{name}", reason, "unused")
        beside = list[Finding]()
        for folder, names in folders(self.root, beside, pruned=(CLIPS,)):
            below = os.path.relpath(folder, self.root)
            for path in (os.path.normpath(os.path.join(below, name)) for name in names):
                if extension_of(path) != ".tsv":
                    yield Finding(path, NOT_READ, "type")
                elif path != self.source.name:
                    yield Finding(path, f"is not read, only {self.source.name} is", "unused")
        yield from beside
