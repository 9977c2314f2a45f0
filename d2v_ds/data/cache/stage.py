"""Copies of shard sets on node-local disks.

    set on a shared file system --stage--> its copy below D2V_STAGE, made once per node

A copy is checked against the SHA-256 of the set's tars (third-party tars: their size) and kept for
later jobs. A set that does not fit is read in place. Nothing else depends on the copy: the plan,
the order of the samples and the configuration are the same.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from d2v_ds.data.cache.folder import LOCK_FILE, added, writing
from d2v_ds.data.shard_format import INDEX_FILE, ShardSet, require_copy
from d2v_ds.files import copy, format_size, locked, write_atomically

log = logging.getLogger("d2v_ds")

RESERVED = 0.05  # fraction of the disk that stays free


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
    with writing(target, "D2V_STAGE"):
        target.mkdir(parents=True, exist_ok=True)
        with locked(target / LOCK_FILE, waiting=alive):
            if (target / INDEX_FILE).exists():
                return target
            if not _fits(shards, target):
                return None
            advice = f"copy the set again (`d2v-shards verify {shards.root}` lists every fault)"
            for entry in shards.shards:
                tar = shards.tar(entry)
                check = partial(require_copy, shards, entry, tar, advice)
                _copy(tar, target, alive, check)
                _copy(shards.index(entry), target, alive)
            write_atomically(target / INDEX_FILE, index)
    log.info("%s was copied to %s", shards.root, target)
    return target


def _fits(shards: ShardSet, target: Path) -> bool:
    files = [file for shard in shards.shards for file in (shards.tar(shard), shards.index(shard))]
    missing = sum(f.stat().st_size for f in files if not (target / f.name).exists())
    disk = shutil.disk_usage(target)
    if missing <= disk.free - RESERVED * disk.total:
        return True
    log.warning(
        "%s is not copied to %s and will be read in place: it takes %s; %s is free, of which %s "
        "must remain",
        shards.root,
        target,
        format_size(missing),
        format_size(disk.free),
        format_size(RESERVED * disk.total),
    )
    return False


def _copy(
    source: Path,
    target: Path,
    alive: Callable[[], None],
    check: Callable[[int, str], None] | None = None,
) -> None:
    """Copies one file unless it exists. check: called with size and SHA-256 before the copy becomes
    visible."""
    if (target / source.name).exists():
        return
    with source.open("rb") as reader, added(target / source.name) as file:
        digest = copy(reader, file, lambda found: alive())
        if check:
            check(file.tell(), digest)
