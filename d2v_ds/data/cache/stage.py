"""Shards on each node's own disk: read once over the network, then as often as there are epochs.

    D2V_STAGE names a folder of the node --> the set is copied there, once a node --> its copy

A copy is checked against the set's checksums, kept for the jobs that come after, and not made when
it does not fit; then the set is read where it lies. Everything else stays as it is: the plan, the
order of the samples and the configuration do not know about the copy.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from d2v_ds.data.shard_format import INDEX_FILE, ShardSet, open_set
from d2v_ds.distributed.collectives import on_all_ranks
from d2v_ds.errors import UserError
from d2v_ds.run.watchdog import PATIENT, Watchdog

log = logging.getLogger("d2v_ds")

SPARE = 0.05  # share of the disk that stays free
CHUNK = 16 * 2**20  # bytes


def own_copy(shards: ShardSet, watchdog: Watchdog) -> ShardSet:
    """The set to read from on this node; a remote one has its own cache. All ranks call it
    together. Raises UserError on all."""
    folder = os.environ.get("D2V_STAGE")
    if not folder or shards.remote:
        return shards
    alive = partial(watchdog.mark, "copying shards", 0)

    def copy() -> Path | None:
        path = stage(shards, Path(folder), alive)
        watchdog.mark(PATIENT, 0)  # other nodes may take long; theirs are watched themselves
        return path

    own = on_all_ranks(copy)[watchdog.rank]
    watchdog.mark("starting", 0)
    return open_set(own, shards.modality) if own else shards


def stage(shards: ShardSet, folder: Path, alive: Callable[[], None]) -> Path | None:
    """The folder of a whole copy of the set below `folder`; None if there is no room for one.

    However many processes of this node call it, one copies and the others wait for it. alive: is
    called again and again meanwhile. Raises UserError when what was read is not what the set's
    index promises, or `folder` cannot be written.
    """
    index = (shards.root / INDEX_FILE).read_bytes()
    if shards.tars:  # they will lie beside the index
        index = json.dumps({k: v for k, v in json.loads(index).items() if k != "tars"}).encode()
    target = folder / "d2v_ds" / f"{shards.root.name}-{hashlib.sha256(index).hexdigest()[:16]}"
    try:
        target.mkdir(parents=True, exist_ok=True)
        with (target / ".lock").open("w") as lock:
            _wait_for(lock.fileno(), alive)
            if (target / INDEX_FILE).exists():
                return target
            if not _fits(shards, target):
                return None
            for shard in shards.shards:
                _copy(shards.tar(shard), target, shard.sha256, alive)
                _copy(shards.index(shard), target, None, alive)
            aside = target / f"{INDEX_FILE}.tmp"
            aside.write_bytes(index)
            aside.replace(target / INDEX_FILE)
    except OSError as error:
        raise UserError(f"D2V_STAGE: cannot copy {shards.root} to {target}: {error}") from None
    log.info("%s is copied to %s", shards.root, target)
    return target


def _wait_for(lock: int, alive: Callable[[], None]) -> None:
    while True:
        alive()
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.5)


def _fits(shards: ShardSet, target: Path) -> bool:
    files = [file for shard in shards.shards for file in (shards.tar(shard), shards.index(shard))]
    missing = sum(f.stat().st_size for f in files if not (target / f.name).exists())
    disk = shutil.disk_usage(target)
    if missing <= disk.free - SPARE * disk.total:
        return True
    log.warning(
        "%s is not copied to %s: it needs %.3g GB, %.3g GB are free, of which %.3g stay",
        shards.root,
        target,
        missing / 1e9,
        disk.free / 1e9,
        SPARE * disk.total / 1e9,
    )
    return False


def _copy(source: Path, target: Path, sha256: str | None, alive: Callable[[], None]) -> None:
    """Copies one file, unless it is there: under its name it is whole and was checked."""
    if (target / source.name).exists():
        return
    aside = target / f"{source.name}.tmp"
    digest = hashlib.sha256()
    with source.open("rb") as reader, aside.open("wb") as writer:
        while chunk := reader.read(CHUNK):
            digest.update(chunk)
            writer.write(chunk)
            alive()
    if sha256 and digest.hexdigest() != sha256:
        aside.unlink()
        raise UserError(
            f"{source}: is not what the set's index says (its SHA-256 differs); "
            f"`d2v-shards verify {source.parent}` says more"
        )
    aside.replace(target / source.name)
