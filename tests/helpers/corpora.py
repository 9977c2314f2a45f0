"""Writes small corpora in common layouts and reads the contents of a shard set."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from d2v_ds.data.checks import Unusable
from d2v_ds.data.ogg import streams
from d2v_ds.data.shard_format import open_set
from d2v_ds.data.shard_index import read_index
from shards.verify import read_members

FORMATS = {
    "wav": ("WAV", "PCM_16"),
    "flac": ("FLAC", "PCM_16"),
    "mp3": ("MP3", "MPEG_LAYER_III"),
    "ogg": ("OGG", "VORBIS"),
    "opus": ("OGG", "OPUS"),
}


def recording(
    kind: str = "wav", seconds: float = 0.3, rate: int = 16_000, channels: int = 1, seed: int = 0
) -> bytes:
    """Encoded noise, different in each channel."""
    x = np.random.default_rng(seed).integers(-9000, 9000, (int(seconds * rate), channels))
    container, subtype = FORMATS[kind]
    buffer = io.BytesIO()
    soundfile.write(buffer, x.astype(np.int16), rate, format=container, subtype=subtype)
    return buffer.getvalue()


def ogg_problem(data: bytes) -> str:
    """The damage of an Ogg file; "" if there is none."""
    try:
        streams(data)
    except Unusable as error:
        return str(error)
    return ""


def put(path: Path, data: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def put_tar(path: Path, named: list[tuple[str, bytes]]) -> Path:
    """Writes a PAX tar, as Python's tarfile does, not in webdataset's format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in named:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def contents(folder: Path) -> dict[str, dict[str, Any]]:
    """{key: member by field, json as an object}, read through the index."""
    shards, result = open_set(folder), {}
    for shard in shards.shards:
        index = read_index(shards.index(shard))
        with shards.tar(shard).open("rb") as file:
            for i in range(index.count):
                members: dict[str, Any]
                members, changed = read_members(file, index, i)
                assert not changed
                members["json"] = json.loads(members.get("json", b"{}"))
                result[index.key(i)] = members
    return result


def quarantine(folder: Path) -> dict[str, str]:
    return {path: reason for path, (reason, _) in found(folder, "quarantine.jsonl").items()}


def notes(folder: Path) -> dict[str, str]:
    """{file that was passed over or altered: kind}."""
    return {path: kind for path, (_, kind) in found(folder, "notes.jsonl").items()}


def found(folder: Path, file: str) -> dict[str, tuple[str, str]]:
    """{name: (reason, kind)} of a list of findings."""
    lines = (folder / file).read_text().splitlines()
    return {row["path"]: (row["reason"], row["kind"]) for row in map(json.loads, lines)}
