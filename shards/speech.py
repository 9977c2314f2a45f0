"""Speech corpora -> samples of mono 16-bit FLAC: folders of wav and flac, and TSV manifests.

    folder or manifest -> plan (which recordings make which sample) -> convert (one's members)

A sample has KEY.flac, and KEY.json with the manifest's columns (label, speaker, ...), "paths" of
the original recordings and "duration" in seconds, as measured. In corpora of short recordings
several of them are joined end to end into one sample: a crop for pre-training needs that much.

S raw audio samples.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from d2v_ds import audio
from d2v_ds.errors import UserError, suggestion
from shards.core import Converted, Plan, Rejected, Sample, plan_shards, scattered

EXTENSIONS = (".wav", ".flac")
MANIFEST = ".tsv"
MAX_KEY = 90  # bytes: with its extension a key still fits the 100 of a name in a tar header
KEY_HASH = 12  # hex digits


@dataclass(frozen=True)
class SpeechConverter:
    root: Path  # of the paths in the plan
    sample_rate: int

    modality: ClassVar[str] = "speech"
    unit: ClassVar[str] = "frames"
    fields: ClassVar[tuple[str, ...]] = ("flac", "json")

    def convert(self, sample: Sample) -> Converted:
        """Recordings that cannot be used are left out of the sample and named."""
        parts: list[NDArray[np.int16]] = []
        used: list[str] = []
        rejected: list[Rejected] = []
        flac = b""
        for path in sample.paths:
            try:
                part, flac = self._read(self.root / path)
            except ValueError as error:
                rejected.append((path, str(error)))
            except OSError as error:
                rejected.append((path, error.strerror or str(error)))
            else:
                parts.append(part)
                used.append(path)
        if not parts:
            return Converted((), 0, tuple(rejected))
        samples = parts[0] if len(parts) == 1 else np.concatenate(parts)  # [S]
        if len(parts) > 1 or not flac:
            flac = audio.encode_flac(samples, self.sample_rate)
        about = {
            **sample.columns,
            "paths": used,
            "duration": round(len(samples) / self.sample_rate, 4),
        }
        return Converted((flac, json.dumps(about).encode()), len(samples), tuple(rejected))

    def _read(self, path: Path) -> tuple[NDArray[np.int16], bytes]:
        """Samples int16 [S] at the set's rate; and the file's own bytes where they hold just that,
        so that nothing is encoded again. Decoded in any case: only that shows damage."""
        data = path.read_bytes()
        info = audio.info(data)
        x = audio.decode(data)
        stored = (info.format, info.subtype, info.channels, info.rate)
        as_is = stored == ("FLAC", "PCM_16", 1, self.sample_rate)
        samples = audio.to_int16(audio.resample(x, info.rate, self.sample_rate))
        return samples, data if as_is else b""


def check(members: Mapping[str, bytes], sample_rate: int) -> int:
    """The length in frames of a sample of a set, all of it decoded. Raises ValueError."""
    info = audio.info(members["flac"])
    if (info.rate, info.channels) != (sample_rate, 1):
        raise ValueError(f"flac: {info.rate} Hz, {info.channels} channels; the set says "
                         f"{sample_rate} Hz, 1 channel")  # fmt: skip
    if not isinstance(json.loads(members["json"]), dict):
        raise ValueError("json: is no object")
    return len(audio.decode(members["flac"]))


# --------------------------------------------------------------------------------------------- plan


def plan(
    source: Path, *, rate: int, join: str, join_seconds: float, shard_size: int, seed: int
) -> tuple[Plan, SpeechConverter]:
    """The conversion of a folder, or of a manifest: TAB-separated, a header line, a column `path`
    (relative to the manifest), any other columns. Raises UserError.

    join: a column; recordings that agree in it are joined without gaps into samples of about
    `join_seconds`, and the other columns are dropped. "": one sample a recording.
    """
    if source.is_dir():
        root, samples = source, _walk(source)
    elif source.suffix == MANIFEST and source.is_file():
        root, samples = source.parent, _read_manifest(source)
    elif not source.exists():
        raise UserError(f"{source}: no such folder or manifest")
    else:
        raise UserError(f"{source}: is neither a folder nor a manifest ({MANIFEST})")
    options: dict[str, Any] = {"rate": rate, "shard-size": shard_size, "seed": seed}
    if join:
        options |= {"join": join, "join-seconds": join_seconds}
        samples = _join(source, root, samples, join, join_seconds, seed)
    shards = plan_shards(_with_unique_keys(samples), shard_size, seed)
    return Plan(options, shards), SpeechConverter(root, rate)


def _walk(root: Path) -> list[Sample]:
    """Every wav and flac below a folder, sorted; links are followed, each folder visited once."""
    samples: list[Sample] = []
    others: Counter[str] = Counter()
    visited = set()
    for folder, names, files in os.walk(root, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in visited:
            names.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        names.sort()
        for name in sorted(files):
            extension = os.path.splitext(name)[1].lower()
            if name.startswith("."):  # what file managers leave
                continue
            if extension in EXTENSIONS:
                samples.append(_sample(root, os.path.relpath(os.path.join(folder, name), root), {}))
            else:
                others[extension or name] += 1
    if not samples:
        found = ", ".join(f"{n} {kind}" for kind, n in others.most_common(5)) or "nothing"
        raise UserError(f"{root}: has no {' or '.join(EXTENSIONS)} file in it (found: {found})")
    return samples


def _read_manifest(manifest: Path) -> list[Sample]:
    try:
        lines = manifest.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{manifest}: is not UTF-8 ({error})") from None
    columns = lines[0].split("\t")
    if "path" not in columns or len(set(columns)) != len(columns):
        raise UserError(
            f"{manifest}: its first line must name the columns, separated by TAB, each once, one "
            f"of them `path`; it is {lines[0]!r}"
        )
    rows: dict[str, Sample] = {}
    for number, line in enumerate(lines[1:], start=2):
        if not line:
            continue
        cells = line.split("\t")
        if len(cells) != len(columns):
            raise UserError(
                f"{manifest}, line {number}: {len(cells)} columns, the header has {len(columns)}"
            )
        row = dict(zip(columns, cells, strict=True))
        path = row.pop("path")
        if path in rows:
            raise UserError(f"{manifest}, line {number}: lists {path} again; once is enough")
        rows[path] = _sample(manifest.parent, path, row)
    if not rows:
        raise UserError(f"{manifest}: has a header line only, no recording")
    return list(rows.values())


def _sample(root: Path, path: str, columns: dict[str, str]) -> Sample:
    try:
        size = os.stat(root / path).st_size
    except OSError:  # converting it will say why
        size = 0
    return Sample(make_key(os.path.splitext(path)[0]), (path,), columns, size)


def _join(
    source: Path, root: Path, samples: list[Sample], column: str, seconds: float, seed: int
) -> list[Sample]:
    """Per value of the column, as many samples of even length as come nearest to `seconds`."""
    groups: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        if column not in sample.columns:
            raise UserError(
                f"--join {column}: {source} has no such column{suggestion(column, sample.columns)}"
            )
        groups[sample.columns[column]].append(sample)
    joined = []
    for value, members in sorted(groups.items()):
        order = scattered(members, seed)
        durations = [_seconds(root / sample.paths[0]) for sample in order]
        total = sum(durations)
        parts: list[list[Sample]] = [[] for _ in range(max(1, round(total / seconds)))]
        passed = 0.0
        for sample, duration in zip(order, durations, strict=True):
            middle = (passed + duration / 2) / total if total else 0.0
            parts[min(int(middle * len(parts)), len(parts) - 1)].append(sample)
            passed += duration
        for i, part in enumerate(part for part in parts if part):
            joined.append(
                Sample(
                    make_key(f"{value}-{i:06d}"),
                    tuple(sample.paths[0] for sample in part),
                    {column: value},
                    sum(sample.size for sample in part),
                )
            )
    return joined


def _seconds(path: Path) -> float:
    try:
        info = audio.info(path)
    except (ValueError, OSError):  # converting it will say why
        return 0.0
    return info.frames / info.rate


# --------------------------------------------------------------------------------------------- keys


def make_key(text: str, apart: str = "") -> str:
    """A WebDataset key from a path without its extension: letters, digits, `_`, `-` and `/`.

    webdataset cuts a name at the first dot and skips names that begin with two underscores. Keys
    that are too long for a tar header, or are to be told `apart`, end in a hash.
    """
    key = re.sub(r"[^\w/-]", "_", os.path.normpath(text).lstrip("/"))
    key = re.sub(r"^__+", "_", key)
    if apart or len(key.encode()) > MAX_KEY:
        whole = f"{text}\0{apart}".encode("utf-8", "surrogateescape")
        digest = hashlib.sha256(whole).hexdigest()[:KEY_HASH]
        key = key.encode()[: MAX_KEY - KEY_HASH - 1].decode("utf-8", "ignore") + "_" + digest
    return key


def _with_unique_keys(samples: list[Sample]) -> list[Sample]:
    """Keys that several samples share (a.b.wav and a_b.wav; a.wav and a.flac) get a hash."""
    uses = Counter(sample.key for sample in samples)
    return [
        replace(s, key=make_key(s.key, "\0".join(s.paths))) if uses[s.key] > 1 else s
        for s in samples
    ]
