"""WebDataset tars made by others: SOURCE is a tar or a folder of tars; of each sample the recording
and what lies beside it in json (an object), txt and cls (https://github.com/webdataset/webdataset).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from d2v_ds.data.tar_scan import DamagedTar, Member, members, next_header, samples
from d2v_ds.errors import UserError
from shards.family import Input, Sample
from shards.keys import make_key
from shards.walking import AUDIO, walk

LABELS = {"txt": "text", "cls": "label"}  # column of a member


def read(source: Path, rejected: list[tuple[str, str]]) -> tuple[Path, Iterator[Sample]]:
    if source.is_dir():
        root, names = source, [path for path, name, _ in walk(source) if name.endswith(".tar")]
    else:
        root, names = source.parent, [source.name]
    if not names or not (root / names[0]).is_file():
        raise UserError(f"{source}: is no tar and no folder with tars")
    return root, _samples(root, names, rejected)


def _samples(root: Path, names: list[str], rejected: list[tuple[str, str]]) -> Iterator[Sample]:
    for name in names:
        with (root / name).open("rb") as file:
            for key, group in samples(sound_members(file, name, rejected)):
                audio = next((e[1:] for e in AUDIO if e[1:] in group), "")
                if not audio:
                    rejected.append(
                        (f"{name}, {key}", f"has no recording, only {', '.join(group)}")
                    )
                    continue
                columns = _columns(file, group, f"{name}, {key}", rejected)
                stretch = (group[audio].offset, group[audio].size)
                inputs = (Input(name, stretch),)
                yield Sample(make_key(key), inputs, columns, group[audio].size)


def sound_members(file: BinaryIO, name: str, rejected: list[tuple[str, str]]) -> Iterator[Member]:
    """Past damaged headers: each is told, and the scan goes on at the next sound one."""
    start: int | None = 0
    while start is not None:
        try:
            yield from members(file, start)
            return
        except DamagedTar as error:
            rejected.append((name, f"{error}: what lies there is lost"))
            start = next_header(file, error.position)


def _columns(
    file: BinaryIO, group: dict[str, Member], where: str, rejected: list[tuple[str, str]]
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
                    raise ValueError("is no object")
                columns |= about
            else:
                columns[LABELS[field]] = data.decode().strip()
        except (ValueError, RecursionError) as error:
            rejected.append((f"{where}.{field}", f"{error}; its recording goes without"))
    return columns
