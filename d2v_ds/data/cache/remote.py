"""Remote shard sets, read through a cache on the node's own disk.

    URL/index.json, URL/*.idx --open_remote--> ShardSet;  URL/NAME.tar --open_shard--> open file

A set is given by its URL prefix or by a command (download.py). A shard is downloaded shortly before
it is read, once per node, however many processes need it. It is checked against the size and hash
in index.json (third-party tars only against the size) and renamed when it is complete. When the
cache is full, the least recently used shards are removed, except those that a process has open.

What is in the cache is looked at again: index.json and the indexes at every start, the size of a
tar whenever it is opened. What has been damaged is downloaded again (also renew.py).

D2V_CACHE is the folder of the cache, D2V_CACHE_BYTES its size (default: 200GB).
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import logging
import os
import re
import stat
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from d2v_ds.data.cache.folder import LOCK_FILE, Cache, added, has_index
from d2v_ds.data.cache.private import private, writing
from d2v_ds.data.download import fetch, read_all, try_again, url_of
from d2v_ds.data.shard_format import (
    INDEX_FILE,
    ShardEntry,
    ShardSet,
    open_set,
    require_copy,
    set_of,
)
from d2v_ds.data.shard_index import most_bytes, parse_index
from d2v_ds.files import locked, write_atomically
from d2v_ds.secrets import mask

log = logging.getLogger("d2v_ds")

PARALLEL_DOWNLOADS = 16  # of indexes
SET_FILE_BYTES = 1 << 28  # maximum size of an index.json: a million shards
UPLOAD = "upload it again"  # advice about a file that is damaged where it was downloaded from
DOWNLOAD = "it is downloaded again"


def open_remote(where: str, modality: str = "", cache: Cache | None = None) -> ShardSet:
    """The set at a URL prefix. Downloads its indexes, but no tars. Raises UserError.

    The tars are beside index.json, whatever folder it names.
    """
    cache = cache or Cache.from_environment()
    url = url_of(where, INDEX_FILE)
    content = try_again(lambda: read_all(url, SET_FILE_BYTES), url)
    for entry in set_of(content, Path(), mask(url), UPLOAD).shards:
        url_of(where, f"{entry.name}.tar")  # refuses its name before anything is written
    name = re.sub(r"\W+", "_", mask(where).rstrip("/").rpartition("/")[2])[:40]
    folder = cache.folder / f"{name}-{hashlib.sha256(where.encode() + content).hexdigest()[:16]}"
    private(folder, "D2V_CACHE")
    with writing(folder), locked(folder / LOCK_FILE):
        _keep(folder / INDEX_FILE, content)
        shards = open_set(folder, modality, check_tars=False)
        shards = dataclasses.replace(shards, remote=where, tars=None)
        with ThreadPoolExecutor(PARALLEL_DOWNLOADS) as pool:
            list(pool.map(lambda entry: keep_index(shards, entry), shards.shards))
    return shards


def open_shard(shards: ShardSet, entry: ShardEntry, cache: Cache | None = None) -> int:
    """A file descriptor of one of its tars. The tar stays in the cache until it is closed.

    Raises UserError if the download fails or the tar differs from index.json.
    """
    path = shards.tar(entry)
    while True:
        with writing(path.parent):
            file = _opened(path, entry)
            if file is not None:
                return file
            with locked(lock_of(path)):
                if not path.exists():
                    fetch_shard(shards, entry, cache)


def prefetch(shards: ShardSet, upcoming: Iterable[int], cache: Cache | None = None) -> None:
    """Downloads the next shards, given by number, up to half of the cache's size, and marks those
    that are already there as recently used."""
    cache = cache or Cache.from_environment()
    held, seen = 0, set[int]()
    for number in upcoming:
        entry = shards.shards[number]
        held += entry.bytes
        if number in seen or held > cache.limit // 2:
            return
        seen.add(number)
        os.close(open_shard(shards, entry, cache))


def keep_index(shards: ShardSet, entry: ShardEntry) -> None:
    """Downloads the index of a shard unless it is in the cache, undamaged. Raises UserError. The
    caller holds the lock of the folder."""
    if not has_index(shards, entry, DOWNLOAD):
        fetch_index(shards, entry)


def fetch_index(shards: ShardSet, entry: ShardEntry) -> None:
    """Downloads the index of a shard. The caller holds the lock of the folder."""
    path = shards.index(entry)
    url = url_of(shards.remote, path.name)
    with added(path) as file:

        def whole() -> None:
            file.seek(0)
            file.truncate()
            fetch(url, file, most=most_bytes(entry, shards.fields))
            content = Path(file.name).read_bytes()
            parse_index(content, mask(url), entry, shards.fields, UPLOAD)

        try_again(whole, url)


def fetch_shard(shards: ShardSet, entry: ShardEntry, cache: Cache | None = None) -> None:
    """Downloads a tar; it replaces the one in the cache. The caller holds its lock."""
    path = shards.tar(entry)
    url = url_of(shards.remote, path.name)
    with (cache or Cache.from_environment()).added(path, entry.bytes) as file:

        def whole() -> None:
            file.seek(0)
            digest = fetch(url, file, entry.bytes)
            require_copy(shards, entry, mask(url), UPLOAD, file.tell(), digest)

        try_again(whole, url)


def lock_of(tar: Path) -> Path:
    """The file that is locked while a tar is downloaded."""
    return tar.with_suffix(".lock")


def is_at(path: Path, file: int) -> bool:
    """Whether an open file is the one at `path`, and not one that has been replaced."""
    try:
        return os.path.samestat(path.lstat(), os.fstat(file))
    except FileNotFoundError:
        return False


def _opened(path: Path, entry: ShardEntry) -> int | None:
    """A descriptor of the tar; None if it is not in the cache, or has another size and was removed
    for that."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    fcntl.flock(file, fcntl.LOCK_SH)
    found = os.fstat(file)
    own = stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid()
    if found.st_nlink and own and found.st_size == entry.bytes:
        os.utime(file)  # most recently used
        return file
    with contextlib.closing(os.fdopen(file, "rb")):
        if found.st_nlink:  # otherwise it was removed before it was locked
            with locked(lock_of(path)):
                if is_at(path, file):
                    log.warning(
                        "%s: has %d bytes, but %s has %d; %s",
                        *(path, found.st_size, INDEX_FILE, entry.bytes, DOWNLOAD),
                    )
                    path.unlink()
    return None


def _keep(path: Path, content: bytes) -> None:
    """Writes a file unless it has this content."""
    with contextlib.suppress(FileNotFoundError):
        if path.read_bytes() == content:
            return
        log.warning("%s: differs from what was downloaded; it is written again", path)
    write_atomically(path, content)
