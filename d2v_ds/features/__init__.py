"""Features of a shard set, one file for each shard: the command `d2v-ds features`.

    SOURCE, SET --open_request--> encoder, shard set, OUT/_features.json
    shards of this rank --write--> OUT/NAME.npy, OUT/NAME.keys.txt    or OUT/NAME.parquet
    OUT/_*.bad.jsonl     --report--> the summary with all bad samples

The file with the features is written last and atomically, so a shard is finished if it exists.
Ranks divide the shards and need not communicate. Samples that cannot be used are left out and
listed in OUT/_NAME.bad.jsonl.

n samples of a shard, T tokens of a sample, D width.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import torch

from d2v_ds.data.shard_format import ShardEntry, ShardSet, fingerprint
from d2v_ds.distributed.world import World, cores_of_rank
from d2v_ds.encoder import PretrainedEncoder, best_device, load_encoder
from d2v_ds.errors import UserError
from d2v_ds.features.formats import (
    Columns,
    NpyTarget,
    ParquetTarget,
    Rows,
    Target,
    import_pyarrow,
)
from d2v_ds.files import locked, remove_stale, write_atomically
from d2v_ds.loader.find_set import find_set
from d2v_ds.loader.reading import BadSample, Reader
from d2v_ds.modalities.base import metadata
from d2v_ds.secrets import mask
from d2v_ds.weights import Which

SETTINGS = "_features.json"  # readers of Parquet folders skip names that begin with _
WINDOW = 16  # batches whose samples are sorted by size together
NAMED = 5  # bad samples that the summary names


@dataclass(frozen=True)
class Request:
    """The arguments of the command."""

    source: Path
    shards: str
    out: Path
    layer: int
    weights: Which = "student"
    modality: str = ""
    pool: Literal["mean", "none"] = "mean"
    format: Literal["npy", "parquet"] = "npy"
    batch: int = 16


@dataclass(frozen=True)
class Opened:
    """What a request names."""

    request: Request
    encoder: PretrainedEncoder
    shards: ShardSet

    def file(self, shard: ShardEntry) -> Path:
        """The file with the features of a shard; the shard is finished if it exists."""
        return self.request.out / f"{shard.name}.{self.request.format}"


def open_request(request: Request) -> Opened:
    """Opens the encoder and the set, and writes OUT/_features.json or compares it. Raises
    UserError, also if OUT has features with other settings."""
    if request.format == "parquet":
        import_pyarrow()
    encoder = load_encoder(request.source, weights=request.weights, modality=request.modality)
    kind = encoder.modality
    if request.layer > encoder.depth:
        raise UserError(f"--layer: the encoder has {encoder.depth} blocks, got {request.layer}")
    shards = find_set(request.shards, kind.name)
    kind.check_set(shards.about)
    settings = {
        "weights": request.weights,
        "layer": request.layer,
        "modality": kind.name,
        "pool": request.pool,
        "format": request.format,
        "model": digest(encoder),
        "set": fingerprint(shards),
    }
    names = {"source": str(request.source), "shards": mask(request.shards), "step": encoder.step}
    try:
        request.out.mkdir(parents=True, exist_ok=True)
        with locked(request.out / ".lock"):
            keep_settings(request.out / SETTINGS, settings, names)
    except OSError as error:
        raise UserError(f"{request.out}: cannot be written ({error.strerror})") from None
    return Opened(request, encoder, shards)


def digest(encoder: PretrainedEncoder) -> str:
    """A hash of the weights, so that a run that trained on is not mixed with its earlier state."""
    found = hashlib.sha256()
    for name, tensor in sorted(encoder.state_dict().items()):
        found.update(name.encode())
        found.update(tensor.contiguous().numpy().tobytes())
    return found.hexdigest()


def keep_settings(file: Path, settings: Mapping[str, Any], names: Mapping[str, Any]) -> None:
    """Writes the settings, or raises UserError if the file has others. names: for people; they are
    not compared, so that sources and sets may move."""
    if not file.exists():
        write_atomically(file, json.dumps({**settings, **names}, indent=1) + "\n")
        return
    try:
        old = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        old = None
    if not isinstance(old, dict):
        raise UserError(
            f"{file}: is damaged, so the features beside it may be of another model; give another "
            "folder, or remove this one"
        )
    changed = [name for name, value in settings.items() if old.get(name) != value]
    if changed:
        described = ", ".join(
            f"another {name}" if name in ("model", "set") else f"{name}={old.get(name)}"
            for name in changed
        )
        raise UserError(
            f"{file.parent}: has features with {described}, of {old.get('source')} at step "
            f"{old.get('step')} and {old.get('shards')}; give another folder, or remove this one"
        )


# ------------------------------------------------------------------------------------------ writing


def write(request: Request, world: World) -> None:
    """Writes the shards of this rank that are not finished. Raises UserError."""
    opened = open_request(request)
    remove_stale(request.out)
    torch.set_num_threads(cores_of_rank())
    opened.encoder.to(best_device(world.local_rank))
    first = list(accumulate((shard.samples for shard in opened.shards.shards), initial=0))
    reader = Reader(opened.shards, (*opened.encoder.modality.extensions, "json"))
    try:
        for i, shard in list(enumerate(opened.shards.shards))[world.rank :: world.size]:
            if not opened.file(shard).exists():
                write_shard(opened, reader, shard, range(first[i], first[i + 1]))
    finally:
        reader.close()


def write_shard(opened: Opened, reader: Reader, shard: ShardEntry, ids: range) -> None:
    request = opened.request
    bad: list[BadSample] = []
    with create_target(opened, reader, shard, ids) as target:
        size = request.batch * WINDOW
        for start in range(ids.start, ids.stop, size):
            window = range(start, min(start + size, ids.stop))
            samples, examples = decoded(opened, reader, window, bad)
            rows = encode(opened, examples)
            target.add([key for key, _ in samples], rows, [meta for _, meta in samples])
        lines = [json.dumps(dataclasses.asdict(each), ensure_ascii=False) for each in bad]
        listed = request.out / f"_{shard.name}.bad.jsonl"
        if bad:
            write_atomically(listed, "".join(f"{line}\n" for line in lines))
        else:
            listed.unlink(missing_ok=True)  # of an interrupted attempt
        target.finish()
    unusable = f", {len(bad)} others cannot be used" if bad else ""
    print(f"{opened.file(shard)}: {len(ids) - len(bad)} samples{unusable}", flush=True)


def create_target(opened: Opened, reader: Reader, shard: ShardEntry, ids: range) -> Target:
    path, pool = opened.file(shard), opened.request.pool
    if opened.request.format == "npy":
        return NpyTarget(path, pool)
    found = (read(reader, sample_id) for sample_id in ids)
    metas = (metadata(each) for each in found if not isinstance(each, ValueError))
    return ParquetTarget(path, Columns.of(metas), pool)


Sample = tuple[str, dict[str, Any]]  # its key and its .json


def decoded(
    opened: Opened, reader: Reader, ids: range, bad: list[BadSample]
) -> tuple[list[Sample], list[Any]]:
    """The usable samples among `ids`, and their examples. Others are added to `bad`. Files are
    decoded in threads: the libraries release the interpreter's lock."""
    kind = opened.encoder.modality

    def example(members: dict[str, bytes] | ValueError) -> Any:
        if isinstance(members, ValueError):
            return members
        try:
            found = kind.decoded(members, None)
            kind.check_example(found)
        except ValueError as error:
            return error
        return found

    members = [read(reader, sample_id) for sample_id in ids]
    with ThreadPoolExecutor(cores_of_rank()) as threads:
        found = list(threads.map(example, members))
    samples, examples = [], []
    for sample_id, each, result in zip(ids, members, found, strict=True):
        if isinstance(each, ValueError) or isinstance(result, ValueError):
            bad.append(reader.bad(sample_id, result))
            continue
        samples.append((reader.key(sample_id), metadata(each)))
        examples.append(result)
    return samples, examples


def read(reader: Reader, sample_id: int) -> dict[str, bytes] | ValueError:
    """A sample's members, or why they cannot be used. Raises UserError if the shard is
    unreadable."""
    try:
        members = reader.read(sample_id)
        metadata(members)
    except UserError:
        raise
    except ValueError as error:
        return error
    return members


def encode(opened: Opened, examples: Sequence[Any]) -> Rows:
    layer = opened.request.layer
    rows: dict[int, Any] = {}
    for group, output in opened.encoder.encode(examples, opened.request.batch):
        if opened.request.pool == "mean":
            rows.update(zip(group, output.pooled(layer).cpu().numpy(), strict=True))
            continue
        block = output.blocks[layer - 1].float().cpu().numpy()
        lengths = [block.shape[1]] * len(block)
        if output.valid is not None:
            lengths = output.valid.sum(1).tolist()
        for i, tokens, length in zip(group, block, lengths, strict=True):
            rows[i] = tokens[:length]
    return [rows[i] for i in range(len(examples))]


# ------------------------------------------------------------------------------------------- report


def report(request: Request, world: World | None = None) -> str:
    """The summary of a folder: shards, samples, and all bad samples, the first ones by name. world:
    only of the shards of this rank."""
    shards = find_set(request.shards)
    own = shards.shards[world.rank :: world.size] if world else shards.shards
    bad = [each for shard in own for each in bad_samples(request.out / f"_{shard.name}.bad.jsonl")]
    total = sum(shard.samples for shard in own)
    lines = [f"{request.out}: {len(own)} shards, {total - len(bad)} of {total} samples"]
    if world and world.size > 1:
        lines[0] = f"rank {world.rank} of {world.size}, {lines[0]}"
    if bad:
        lines.append(f"{len(bad)} samples cannot be used; {request.out}/_*.bad.jsonl lists all:")
        lines += [f"  {each}" for each in bad[:NAMED]] + ["  ..."] * (len(bad) > NAMED)
    return "\n".join(lines)


def bad_samples(file: Path) -> list[BadSample]:
    if not file.exists():
        return []
    lines = file.read_text(encoding="utf-8").splitlines()
    return [BadSample(**json.loads(line)) for line in lines]
