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
from shards.workers import run_jobs

Job = tuple[Path, SampleFormat, str]


def index(
    source: Path, out: Path | None, modality: str, checksums: bool, processes: int
) -> ShardSet:
    """Indexes a tar, or the tars in a folder. Raises UserError."""
    tars = sorted(source.glob("*.tar")) if source.is_dir() else [source]
    if not tars or not tars[0].is_file():
        raise UserError(f"{source}: is neither a tar nor a folder that contains .tar files")

    def run(work: Callable[[Job], IndexedTar], jobs: list[Job]) -> Iterator[IndexedTar]:
        yield from bar(run_jobs(work, jobs, processes))

    def bar(results: Iterable[IndexedTar]) -> Iterator[IndexedTar]:
        yield from tqdm(results, total=len(tars), unit=" tars", disable=None, desc=str(source))

    kind = BEST if checksums else NONE
    return index_set(tars, out or tars[0].parent, sample_formats(modality), kind, run)
