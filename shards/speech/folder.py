"""A folder tree of recordings: the key of a sample is its path."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from d2v_ds.data.checks import Finding
from d2v_ds.errors import UserError
from shards.family import Input, Sample
from shards.keys import make_key
from shards.links import unbroken
from shards.speech.layout import AUDIO, USUAL, SpeechLayout, advised
from shards.walking import NOT_READ, extension_of, walk, wanted


class Folder(SpeechLayout):
    name = "folder"
    help = f"folder tree of {', '.join(USUAL)} files and others that libsndfile reads"
    takes = "folder"

    @classmethod
    def recognises(cls, source: Path) -> bool:
        return source.is_dir()

    def samples(self, findings: list[Finding]) -> Iterator[Sample]:
        kinds = f"{', '.join(USUAL[:-1])} or {USUAL[-1]}"
        others: list[Finding] = []
        files = wanted(
            self.root,
            walk(self.root, findings),
            lambda name: extension_of(name) in AUDIO,
            kinds,
            others,
        )
        try:
            for file in unbroken(self.root, files, findings):
                key = make_key(os.path.splitext(file.path)[0])
                yield Sample(key, (Input(file.path),), {}, file.size, file.place)
        except UserError as error:  # there is no recording
            reasons = {found.reason for found in advised(others)} - {NOT_READ}
            raise UserError("; ".join([str(error), *reasons])) from None
        findings.extend(advised(others))
