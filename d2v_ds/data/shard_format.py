"""The contract between shards/ and the loader: a shard set on disk. Standard library only.

A shard set is one folder and one split; train and test are two sets:

    SET/
      speech-000000.tar    plain WebDataset tar; members KEY.flac, KEY.json
      speech-000000.idx    its index (shard_index.py): offsets, sizes, checksums, lengths
      index.json           the set: modality, unit, sample rate; sizes and hashes of its shards
      quarantine.jsonl     inputs that were left out, with the reason

index.json is written last and atomically; a folder without it is not a complete set. set_file.py
checks its content. Lengths are in the modality's unit (speech: audio frames at the set's sample
rate).
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from d2v_ds.data.set_file import FORMAT, OtherFormat, parse_set
from d2v_ds.errors import UserError

INDEX_FILE = "index.json"
PLAN_FILE = "plan.json"  # of a conversion that is not complete
ADVICE = "copy it again or convert the corpus again"  # about a damaged file of a local set


class DamagedSet(UserError):
    """index.json exists, but its content is not valid."""


@dataclass(frozen=True)
class ShardEntry:
    """One shard of a set, as index.json lists it."""

    name: str  # of its files, without .tar and .idx
    samples: int
    bytes: int  # of the tar
    length: int  # sum over its samples
    sha256: str  # of the tar; of the .idx if the set is `indexed`


@dataclass(frozen=True)
class ShardSet:
    root: Path
    modality: str
    length_unit: str  # frames, pixels or tokens
    sample_rate: int  # frames per second; 0 if the modality has none
    fields: tuple[str, ...]  # members of every sample, without the dot
    shards: tuple[ShardEntry, ...]
    tars: Path | None = None  # the folder of the tars, if it is not root
    about: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)  # index.json
    remote: str = ""  # the URL prefix or command, if remote (cache/remote.py)
    urls: dict[str, str] = field(default_factory=dict)  # of streamed tars, by name, for messages
    source: ShardSet | None = None  # of a copy on this node's disk (cache/stage.py)

    @property
    def indexed(self) -> bool:
        """Whether the tars are from a third party and only their headers were read."""
        return bool(self.about.get("indexed"))

    @property
    def is_copy(self) -> bool:
        """Whether its files can be fetched again, because they are copies on this node's disk."""
        return bool(self.remote or self.source)

    @property
    def samples(self) -> int:
        return sum(shard.samples for shard in self.shards)

    @property
    def length(self) -> int:
        return sum(shard.length for shard in self.shards)

    def tar(self, shard: ShardEntry) -> Path:
        return (self.tars or self.root) / f"{shard.name}.tar"

    def index(self, shard: ShardEntry) -> Path:
        return self.root / f"{shard.name}.idx"


def open_set(path: str | Path, modality: str = "", check_tars: bool = True) -> ShardSet:
    """The shard set in a folder. modality: the required modality; "": any.

    Reads and checks index.json and compares the sizes of the tars, but does not read them. Raises
    UserError if the folder is not a complete set of this modality, or (check_tars) if a tar is
    missing or has another size.
    """
    root = Path(path)
    result = set_of(_read_set_file(root), root, root / INDEX_FILE)
    if modality and result.modality != modality:
        raise UserError(f"{root}: holds {result.modality}, but {modality} is required")
    if not result.samples:
        raise UserError(f"{root}: the shard set has no samples; convert a corpus that has some")
    for shard in result.shards if check_tars else ():
        _check_tar(result.tar(shard), shard.bytes)
    return result


def set_of(content: bytes, root: Path, name: object, advice: str = ADVICE) -> ShardSet:
    """The set in `root` whose index.json has this content. name, advice: of index.json in messages.
    Raises UserError."""
    try:
        raw = parse_set(content)
    except OtherFormat as error:
        raise UserError(
            f"{name}: {error}; convert the corpus again with this version's d2v-shards"
        ) from None
    except ValueError as error:
        raise DamagedSet(f"{name}: is damaged ({error}); {advice}") from None
    return ShardSet(
        root,
        raw["modality"],
        raw["unit"],
        raw["sample_rate"],
        tuple(raw["fields"]),
        tuple(
            ShardEntry(**{f.name: entry[f.name] for f in fields(ShardEntry)})
            for entry in raw["shards"]
        ),
        root / raw["tars"] if "tars" in raw else None,
        raw,
    )


def _read_set_file(root: Path) -> bytes:
    try:
        return (root / INDEX_FILE).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(_why_no_set(root)) from None
    except OSError as error:
        raise UserError(f"{root / INDEX_FILE}: cannot be read ({error.strerror})") from None


def _why_no_set(root: Path) -> str:
    make = "`d2v-shards --help` explains how to make one"
    if not root.exists():
        return f"{root}: no such shard set; {make}"
    if not root.is_dir():
        return f"{root}: is a file, but a shard set is a folder with an {INDEX_FILE}; {make}"
    names = os.listdir(root)
    if PLAN_FILE in names:
        return f"{root}: its conversion is not complete; run the same d2v-shards command again"
    if any(name.endswith(".tar") for name in names):
        return (
            f"{root}: has tars but no {INDEX_FILE}, so d2v-shards did not write them; "
            f"make an index with `d2v-shards index {root}`, or convert their corpus"
        )
    below = sorted(name for name in names if (root / name / INDEX_FILE).is_file())
    if below:
        return f"{root}: is not a shard set, but contains some: {', '.join(below)}"
    return f"{root}: is not a shard set, because it has no {INDEX_FILE}; {make}"


def _check_tar(path: Path, size: int) -> None:
    try:
        found = path.stat().st_size
    except FileNotFoundError:
        raise UserError(
            f"{path}: is missing, but {INDEX_FILE} lists it; copy it again or convert again"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if found != size:
        raise UserError(
            f"{path}: has {found} bytes, but {INDEX_FILE} lists {size}; copy it again or "
            "convert again"
        )


def require_copy(
    shards: ShardSet, entry: ShardEntry, tar: object, advice: str, size: int, digest: str
) -> None:
    """Raises UserError unless a copied tar has the size and the SHA-256 of its entry. The SHA-256
    of third-party tars is unknown, so only their size is checked."""
    if size != entry.bytes:
        raise UserError(f"{tar}: has {size} bytes, but {INDEX_FILE} has {entry.bytes}; {advice}")
    if not shards.indexed and digest != entry.sha256:
        raise UserError(f"{tar}: its SHA-256 differs from {INDEX_FILE}; {advice}")


def fingerprint(shards: ShardSet) -> str:
    """A hash of the set's content: the SHA-256 over the hashes of its shards, in order."""
    return hashlib.sha256("\n".join(s.sha256 for s in shards.shards).encode()).hexdigest()


def set_json(shards: ShardSet, **about: Any) -> str:
    """The content of index.json. about: information for people (options, converter, ...)."""
    return json.dumps(
        {
            "format": FORMAT,
            "modality": shards.modality,
            "unit": shards.length_unit,
            "sample_rate": shards.sample_rate,
            "fields": list(shards.fields),
            "samples": shards.samples,
            "bytes": sum(s.bytes for s in shards.shards),
            "length": shards.length,
            **({"tars": str(shards.tars)} if shards.tars else {}),
            **about,
            "shards": [asdict(s) for s in shards.shards],
        },
        indent=1,
    )
