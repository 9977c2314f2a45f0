"""Copies of shard sets on node-local disks.

    set on a shared file system --stage--> its copy below D2V_STAGE, made once per node

A copy is checked against the SHA-256 of the set's tars (third-party tars: their size) and kept for
later jobs. A set that does not fit is read in place. Nothing else depends on the copy: the plan,
the order of the samples and the configuration are the same. Every start looks at the copy again and
copies what has been damaged once more (also renew.py).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

from d2v_ds.data.cache.folder import LOCK_FILE, added, has_index
from d2v_ds.data.cache.private import own_folder, private, writing
from d2v_ds.data.shard_format import (
    INDEX_FILE,
    ShardEntry,
    ShardSet,
    open_set,
    require_copy,
)
from d2v_ds.data.shard_index import index_of
from d2v_ds.files import copy, format_size, locked, write_atomically

log = logging.getLogger("d2v_ds")

RESERVED = 0.05  # fraction of the disk that stays free
COPY = "it is copied again"


def stage(shards: ShardSet, folder: Path, alive: Callable[[], None]) -> Path | None:
    """The folder of a complete copy of the set below `folder`, or None if the disk is too small.

    If several processes of a node call it, one copies and the others wait. alive: called
    repeatedly in the meantime. Raises UserError if a tar differs from the set's index or `folder`
    cannot be written.
    """
    index = (shards.root / INDEX_FILE).read_bytes()
    if shards.tars:  # the copy has them next to the index
        index = json.dumps({k: v for k, v in json.loads(index).items() if k != "tars"}).encode()
    name = f"{shards.root.name}-{hashlib.sha256(index).hexdigest()[:16]}"
    with writing(folder, "D2V_STAGE"):
        target = own_folder(folder, "d2v_ds", "D2V_STAGE") / name
        private(target, "D2V_STAGE")
        with locked(target / LOCK_FILE, waiting=alive):
            there = dataclasses.replace(shards, root=target, tars=None)
            tars = [entry for entry in shards.shards if not _has_tar(there, entry)]
            indexes = [entry for entry in shards.shards if not has_index(there, entry, COPY)]
            file = target / INDEX_FILE
            found = file.read_bytes() if file.exists() else None
            if not (tars or indexes) and found == index:
                return target
            if found not in (None, index):
                log.warning("%s: differs from that of %s; %s", file, shards.root, COPY)
            file.unlink(missing_ok=True)  # until the copy is complete
            if not _fits(shards, target, tars, indexes):
                return None
            for entry in tars:
                copy_tar(shards, target, entry, alive)
            for entry in indexes:
                copy_index(shards, target, entry, alive)
            write_atomically(file, index)
    log.info("%s was copied to %s", shards.root, target)
    return target


def open_copy(shards: ShardSet, folder: Path) -> ShardSet:
    """The copy of a set that `stage` made. Raises UserError."""
    return dataclasses.replace(open_set(folder, shards.modality), source=shards)


def copy_tar(shards: ShardSet, target: Path, entry: ShardEntry, alive: Callable[[], None]) -> None:
    """Copies a tar of the set; it replaces the one in `target`, whose lock the caller holds. Raises
    UserError if it differs from index.json."""
    tar = shards.tar(entry)
    advice = f"copy the set again (`d2v-shards verify {shards.root}` lists every fault)"
    with tar.open("rb") as reader, added(target / tar.name) as file:
        digest = copy(reader, file, lambda found: alive())
        require_copy(shards, entry, tar, advice, file.tell(), digest)


def copy_index(
    shards: ShardSet, target: Path, entry: ShardEntry, alive: Callable[[], None]
) -> None:
    """As copy_tar, of an index."""
    index_of(shards, entry)  # raises UserError if it is damaged
    path = shards.index(entry)
    with path.open("rb") as reader, added(target / path.name) as file:
        copy(reader, file, lambda found: alive())


def _has_tar(there: ShardSet, entry: ShardEntry) -> bool:
    path = there.tar(entry)
    try:
        found = path.lstat().st_size
    except FileNotFoundError:
        return False
    if found == entry.bytes:
        return True
    log.warning("%s: has %d bytes, but %s has %d; %s", path, found, INDEX_FILE, entry.bytes, COPY)
    return False


def _fits(
    shards: ShardSet, target: Path, tars: list[ShardEntry], indexes: list[ShardEntry]
) -> bool:
    missing = sum(entry.bytes for entry in tars)
    missing += sum(shards.index(entry).stat().st_size for entry in indexes)
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
