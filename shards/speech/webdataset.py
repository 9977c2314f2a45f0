"""Third-party WebDataset tars (https://github.com/webdataset/webdataset).

SOURCE is a tar or a folder tree with tars. A sample has one recording; its json (an object), txt
and cls members become columns.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from d2v_ds.data.tar_scan import Member, samples
from d2v_ds.errors import UserError
from shards.family import Input, Rejected, Sample
from shards.keys import make_key
from shards.speech.layout import AUDIO, SpeechLayout
from shards.tars import sound_members
from shards.walking import extension_of, first_folder, walk

TAR = ".tar"
LABELS = {"txt": "text", "cls": "label"}  # column of a member


class WebDataset(SpeechLayout):
    name = "webdataset"
    help = "third-party WebDataset tars: a tar or a folder of tars"

    @classmethod
    def recognises(cls, source: Path) -> bool:
        """A folder: by the first folder that contains tars or recordings."""
        if source.is_file():
            return extension_of(source.name) == TAR
        extensions = set(map(extension_of, first_folder(source, (*AUDIO, TAR))[1]))
        return TAR in extensions and extensions.isdisjoint(AUDIO)

    def samples(self, rejected: list[Rejected]) -> Iterator[Sample]:
        names = [self.source.name]
        if self.source.is_dir():
            names = [path for path, name, _ in walk(self.source) if name.endswith(TAR)]
        if not names:
            raise UserError(f"{self.source}: contains no {TAR} file")
        for name in names:
            with (self.root / name).open("rb") as file:
                yield from _samples(file, name, rejected)


def _samples(file: BinaryIO, name: str, rejected: list[Rejected]) -> Iterator[Sample]:
    for key, group in samples(sound_members(file, name, rejected)):
        audio = next((e[1:] for e in AUDIO if e[1:] in group), "")
        if not audio:
            reason = f"has no recording, only {', '.join(group)}"
            rejected.append((f"{name}, {key}", reason))
            continue
        columns = _columns(file, group, f"{name}, {key}", rejected)
        inputs = (Input(name, (group[audio].offset, group[audio].size)),)
        yield Sample(make_key(key), inputs, columns, group[audio].size)


def _columns(
    file: BinaryIO, group: dict[str, Member], where: str, rejected: list[Rejected]
) -> dict[str, object]:
    columns: dict[str, object] = {}
    for field in ("json", *LABELS):
        if field not in group:
            continue
        file.seek(group[field].offset)
        data = file.read(group[field].size)
        try:
            if field == "json":
                about = json.loads(data)
                if not isinstance(about, dict):
                    raise ValueError("is not an object")
                columns |= about
            else:
                columns[LABELS[field]] = data.decode().strip()
        except (ValueError, RecursionError) as error:
            rejected.append((f"{where}.{field}", f"{error}; the recording is kept without it"))
    return columns
