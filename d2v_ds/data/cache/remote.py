"""Remote shard sets, read through a cache on the node's own disk.

    URL/index.json, URL/*.idx --open_remote--> ShardSet;  URL/NAME.tar --open_shard--> open file

A set is given by its URL prefix or by a command (download.py). A shard is downloaded shortly before
it is read, once per node, however many processes need it. It is checked against the size and hash
in index.json and renamed when it is complete. When the cache is full, the least recently used
shards are removed, except those that a process has open.

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
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

from d2v_ds.data.download import fetch, read_all, try_again, url_of
from d2v_ds.data.shard_format import INDEX_FILE, ShardEntry, ShardSet, open_set, read_lengths
from d2v_ds.errors import UserError
from d2v_ds.files import format_size, locked, parse_size

log = logging.getLogger("d2v_ds")

DEFAULT_BYTES = "200GB"
INDEX_DOWNLOADS = 16  # at the same time


@dataclasses.dataclass(frozen=True)
class Cache:
    """A folder of this node, and the maximum size of its shards in bytes."""

    folder: Path
    limit: int

    @staticmethod
    def from_environment() -> Cache:
        """The cache that D2V_CACHE and D2V_CACHE_BYTES describe. Raises UserError."""
        default = Path(tempfile.gettempdir(), f"d2v_ds-{os.getuid()}")
        try:
            limit = parse_size(os.environ.get("D2V_CACHE_BYTES", DEFAULT_BYTES))
        except ValueError as error:
            raise UserError(f"D2V_CACHE_BYTES: {error}") from None
        return Cache(Path(os.environ.get("D2V_CACHE") or default), limit)


def open_remote(where: str, modality: str = "", cache: Cache | None = None) -> ShardSet:
    """The set at a URL prefix. Downloads its indexes, but no tars. Raises UserError."""
    cache = cache or Cache.from_environment()
    content = try_again(lambda: read_all(url_of(where, INDEX_FILE)), url_of(where, INDEX_FILE))
    name = re.sub(r"\W+", "_", where.rstrip("/").rpartition("/")[2])[:40]
    folder = cache.folder / f"{name}-{hashlib.sha256(where.encode() + content).hexdigest()[:16]}"
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / ".lock"):
            aside = folder / f"{INDEX_FILE}.tmp"
            if not (folder / INDEX_FILE).exists():
                aside.write_bytes(content)
                aside.replace(folder / INDEX_FILE)
            shards = open_set(folder, modality, check_tars=False)
            shards = dataclasses.replace(shards, remote=where)
            with ThreadPoolExecutor(INDEX_DOWNLOADS) as pool:
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


def keep_near(shards: ShardSet, upcoming: Iterable[int], cache: Cache | None = None) -> None:
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


class OwnFolder:
    """A folder in the cache for temporary files of this process. Raises UserError.

    It is removed by `close` or, if the process is killed, when another process creates such a
    folder. It does not count towards the size of the cache.
    """

    def __init__(self, cache: Cache | None = None) -> None:
        parent = (cache or Cache.from_environment()).folder / "own"
        with writing(parent):
            parent.mkdir(parents=True, exist_ok=True)
            with locked(parent / ".lock"):
                for left in parent.glob("*/"):
                    _remove_unused(left)
                self.path = Path(tempfile.mkdtemp(prefix=f"{os.getpid()}-", dir=parent))
                self._lock = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
                fcntl.flock(self._lock, fcntl.LOCK_EX)

    def close(self) -> None:
        if self._lock >= 0:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)
            self._lock = -1


# ---------------------------------------------------------------------------------------- fetching


def _fetch_index(shards: ShardSet, entry: ShardEntry) -> None:
    path = shards.index(entry)
    if path.exists():
        return
    aside = path.with_suffix(".idx.tmp")

    def whole() -> None:
        with aside.open("wb") as file:
            fetch(url_of(shards.remote, path.name), file)
        read_lengths(aside, entry)

    try_again(whole, url_of(shards.remote, path.name))
    aside.replace(path)


def _fetch_shard(shards: ShardSet, entry: ShardEntry, cache: Cache) -> None:
    path = shards.tar(entry)
    url = url_of(shards.remote, path.name)
    aside = path.with_suffix(".tar.tmp")
    with _room_for(aside, entry.bytes, cache) as file:

        def whole() -> None:
            file.seek(0)
            digest = fetch(url, file, entry.bytes)
            if digest != entry.sha256:
                raise UserError(f"{url}: its SHA-256 differs from {INDEX_FILE}; upload it again")

        try:
            try_again(whole, url)
            aside.rename(path)
        except BaseException:
            aside.unlink()
            raise


# --------------------------------------------------------------------------------------- the folder


@contextlib.contextmanager
def _room_for(aside: Path, size: int, cache: Cache) -> Iterator[BinaryIO]:
    """A new open file of this size; removes other shards to make room for it."""
    with locked(cache.folder / ".lock"):
        _evict(cache, size)
        file = aside.open("wb")
        fcntl.flock(file, fcntl.LOCK_EX)  # locked while it is being written
        file.truncate(size)
    with file:
        yield file


def _evict(cache: Cache, size: int) -> None:
    """Removes the least recently used shards until `size` more bytes fit."""
    files = [*cache.folder.glob("*/*.tar"), *cache.folder.glob("*/*.tar.tmp")]
    found = sorted(
        (stat.st_mtime_ns, stat.st_size, file) for file in files if (stat := _stat(file))
    )
    held = sum(each for _, each, _ in found)
    for _, each, file in found:
        if held + size <= cache.limit and file.suffix != ".tmp":
            continue
        if _remove_unused(file):
            held -= each
    if held + size > cache.limit:
        log.warning(
            "%s: the shards in use and the next one take %s, but D2V_CACHE_BYTES is %s; raise it, "
            "or the same shards will be downloaded repeatedly",
            cache.folder,
            format_size(held + size),
            format_size(cache.limit),
        )


def _stat(file: Path) -> os.stat_result | None:
    try:
        return file.stat()
    except FileNotFoundError:
        return None


def _remove_unused(path: Path) -> bool:
    """Removes a file or folder that no process has locked. Returns whether it was removed."""
    try:
        opened = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    except (FileNotFoundError, BlockingIOError):
        return False
    finally:
        os.close(opened)
    return True


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turns errors of the local disk into UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"D2V_CACHE: cannot write {folder} ({error.strerror or error})") from None
