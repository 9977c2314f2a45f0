"""Copies of shard sets on node-local disks.

    set on a shared file system --stage--> its copy below D2V_STAGE, made once per node

A copy is checked against the checksums of the set and kept for later jobs. A set that does not fit
is read in place. Nothing else depends on the copy: the plan, the order of the samples and the
configuration are the same.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from d2v_ds.data.shard_format import INDEX_FILE, ShardSet
from d2v_ds.errors import UserError
from d2v_ds.files import format_size

log = logging.getLogger("d2v_ds")

SPARE = 0.05  # fraction of the disk that stays free
CHUNK = 16 * 2**20  # bytes


def stage(shards: ShardSet, folder: Path, alive: Callable[[], None]) -> Path | None:
    """The folder of a complete copy of the set below `folder`, or None if the disk is too small.

    If several processes of a node call it, one copies and the others wait. alive: called
    repeatedly in the meantime. Raises UserError if a tar differs from the set's index or `folder`
    cannot be written.
    """
    index = (shards.root / INDEX_FILE).read_bytes()
    if shards.tars:  # the copy has them next to the index
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
    log.info("%s was copied to %s", shards.root, target)
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
        "%s is not copied to %s and will be read in place: it takes %s; %s is free, of which %s "
        "must remain",
        shards.root,
        target,
        format_size(missing),
        format_size(disk.free),
        format_size(SPARE * disk.total),
    )
    return False


def _copy(source: Path, target: Path, sha256: str | None, alive: Callable[[], None]) -> None:
    """Copies one file unless it exists. A file has its final name only when it was checked."""
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
            f"{source}: its SHA-256 differs from the set's index; copy the set again "
            f"(`d2v-shards verify {source.parent}` lists every fault)"
        )
    aside.replace(target / source.name)
