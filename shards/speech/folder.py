"""A folder tree of recordings: the key of a sample is its path."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from d2v_ds.data.checks import Finding
from shards.family import Input, Sample
from shards.keys import make_key
from shards.speech.layout import AUDIO, SpeechLayout
from shards.walking import extension_of, walk, wanted


class Folder(SpeechLayout):
    name = "folder"
    help = f"folder tree of {', '.join(AUDIO)} files"
    takes = "folder"

    @classmethod
    def recognises(cls, source: Path) -> bool:
        return source.is_dir()

    def samples(self, findings: list[Finding]) -> Iterator[Sample]:
        kinds = f"{', '.join(AUDIO[:-1])} or {AUDIO[-1]}"
        files = wanted(
            self.root,
            walk(self.root, findings),
            lambda name: extension_of(name) in AUDIO,
            kinds,
            findings,
        )
        for path, _, size in files:
            yield Sample(make_key(os.path.splitext(path)[0]), (Input(path),), {}, size)
