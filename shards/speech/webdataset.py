"""Third-party WebDataset tars (https://github.com/webdataset/webdataset).

SOURCE is a tar or a folder tree with tars. A sample has one recording; its json (an object), txt
and cls members become columns. Links within a tar stand for their target.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from d2v_ds.data.checks import Finding
from d2v_ds.data.tar_scan import Member
from shards.family import Input, Sample
from shards.keys import make_key
from shards.speech.layout import AUDIO, SpeechLayout, is_packed, packed_files
from shards.tars import TAR, grouped

LABELS = {"txt": "text", "cls": "label"}  # column of a member


class WebDataset(SpeechLayout):
    name = "webdataset"
    help = "third-party WebDataset tars: a tar or a folder of tars"

    @classmethod
    def recognises(cls, source: Path) -> bool:
        return is_packed(source, TAR)

    def samples(self, findings: list[Finding]) -> Iterator[Sample]:
        for name in list(packed_files(self.source, TAR, findings)):
            with (self.root / name).open("rb") as file:
                yield from _samples(file, name, findings)


def _samples(file: BinaryIO, name: str, findings: list[Finding]) -> Iterator[Sample]:
    fields = [extension[1:] for extension in AUDIO]
    for key, field, group in grouped(file, name, fields, "recording", findings):
        recording = group[field]
        columns = _columns(file, group, f"{name}, {key}", findings)
        inputs = (Input(name, (recording.offset, recording.size)),)
        yield Sample(make_key(key), inputs, columns, recording.size)


def _columns(
    file: BinaryIO, group: dict[str, Member], where: str, findings: list[Finding]
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
                columns[LABELS[field]] = data.decode("utf-8-sig").strip()
        except (ValueError, RecursionError) as error:
            reason = f"{error}; the recording is kept without it"
            findings.append(Finding(f"{where}.{field}", reason, "no metadata"))
    return columns
