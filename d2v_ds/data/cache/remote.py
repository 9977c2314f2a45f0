"""Remote shard sets, read through a cache on the node's own disk.

    URL/index.json, URL/*.idx --open_remote--> ShardSet;  URL/NAME.tar --open_shard--> open file

A set is given by its URL prefix or by a command (download.py). A shard is downloaded shortly before
it is read, once per node, however many processes need it. It is checked against the size and hash
in index.json (third-party tars only against the size) and renamed when it is complete. When the
cache is full, the least recently used shards are removed, except those that a process has open.

D2V_CACHE is the folder of the cache, D2V_CACHE_BYTES its size (default: 200GB).
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from d2v_ds.data.cache.folder import LOCK_FILE, Cache, added, writing
from d2v_ds.data.download import fetch, read_all, try_again, url_of
from d2v_ds.data.shard_format import (
    INDEX_FILE,
    ShardEntry,
    ShardSet,
    open_set,
    read_lengths,
    require_copy,
)
from d2v_ds.files import locked, write_atomically

PARALLEL_DOWNLOADS = 16  # of indexes


def open_remote(where: str, modality: str = "", cache: Cache | None = None) -> ShardSet:
    """The set at a URL prefix. Downloads its indexes, but no tars. Raises UserError."""
    cache = cache or Cache.from_environment()
    content = try_again(lambda: read_all(url_of(where, INDEX_FILE)), url_of(where, INDEX_FILE))
    name = re.sub(r"\W+", "_", where.rstrip("/").rpartition("/")[2])[:40]
    folder = cache.folder / f"{name}-{hashlib.sha256(where.encode() + content).hexdigest()[:16]}"
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / LOCK_FILE):
            if not (folder / INDEX_FILE).exists():
                write_atomically(folder / INDEX_FILE, content)
            shards = open_set(folder, modality, check_tars=False)
            shards = dataclasses.replace(shards, remote=where)
            with ThreadPoolExecutor(PARALLEL_DOWNLOADS) as pool:
                list(pool.map(lambda entry: _fetch_index(shards, entry), shards.shards))
    return shards


def open_shard(shards: ShardSet, entry: ShardEntry, cache: Cache | None = None) -> int:
    """A file descriptor of one of its tars. The tar stays in the cache until it is closed.

    Raises UserError if the download fails or the tar differs from index.json.
    """
    path = shards.tar(entry)
    while True:
        with contextlib.suppress(FileNotFoundError):
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            fcntl.flock(file, fcntl.LOCK_SH)
            if os.fstat(file).st_nlink:
                os.utime(file)  # most recently used
                return file
            os.close(file)  # removed before it was locked
        with writing(path.parent), locked(path.with_suffix(".lock")):
            if not path.exists():
                _fetch_shard(shards, entry, cache or Cache.from_environment())


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


def _fetch_index(shards: ShardSet, entry: ShardEntry) -> None:
    path = shards.index(entry)
    if path.exists():
        return
    url = url_of(shards.remote, path.name)
    with added(path) as file:

        def whole() -> None:
            file.seek(0)
            file.truncate()
            fetch(url, file)
            read_lengths(Path(file.name), entry)

        try_again(whole, url)


def _fetch_shard(shards: ShardSet, entry: ShardEntry, cache: Cache) -> None:
    path = shards.tar(entry)
    url = url_of(shards.remote, path.name)
    with cache.added(path, entry.bytes) as file:

        def whole() -> None:
            file.seek(0)
            digest = fetch(url, file, entry.bytes)
            require_copy(shards, entry, url, "upload it again", file.tell(), digest)

        try_again(whole, url)
