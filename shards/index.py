"""d2v-shards index: makes a shard set of third-party tars by writing an index.

tars -> d2v_ds/data/tar_index.py, one job per tar -> an index next to the tars or in OUT
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from tqdm import tqdm

from d2v_ds.data.checksum import BEST, NONE
from d2v_ds.data.headers import SampleFormat
from d2v_ds.data.shard_format import ShardSet
from d2v_ds.data.tar_index import IndexedTar, index_set
from d2v_ds.errors import UserError
from d2v_ds.modalities import sample_formats
from shards.tars import TAR, how_to_unpack, refuse_compressed, unpacker
from shards.workers import run_jobs

Job = tuple[Path, SampleFormat, str]


def index(
    source: Path, out: Path | None, modality: str, checksums: bool, processes: int
) -> ShardSet:
    """Indexes a tar, or the tars in a folder. Raises UserError."""
    tars = _tars_of(source)

    def run(work: Callable[[Job], IndexedTar], jobs: list[Job]) -> Iterator[IndexedTar]:
        yield from bar(run_jobs(work, jobs, processes))

    def bar(results: Iterable[IndexedTar]) -> Iterator[IndexedTar]:
        yield from tqdm(results, total=len(tars), unit=" tars", disable=None, desc=str(source))

    kind = BEST if checksums else NONE
    return index_set(tars, out or tars[0].parent, sample_formats(modality), kind, run)


def _tars_of(source: Path) -> list[Path]:
    """A tar, or the tars in a folder. Raises UserError if there are none, and for a tar that cannot
    be read by an index: compressed, or with an ending in capitals."""
    refuse_compressed(source)
    files = sorted(source.iterdir()) if source.is_dir() else [source]
    tars = [file for file in files if file.suffix.lower() == TAR and file.is_file()]
    if not tars:
        compressed = [file.name for file in files if unpacker(file.name)]
        more = f" ({compressed[0]} {how_to_unpack(compressed[0])})" if compressed else ""
        raise UserError(f"{source}: is neither a tar nor a folder that contains .tar files{more}")
    for tar in tars:
        refuse_compressed(tar)
        if tar.suffix != TAR:
            raise UserError(f"{tar}: the names of indexed tars end in {TAR}; rename it")
    return tars
