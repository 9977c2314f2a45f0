"""Remote shard sets, through a cache on this node's own disk that is bounded in bytes.

    URL/index.json, URL/*.idx --open_remote--> ShardSet;  URL/NAME.tar --open_shard--> an open file

A set is named by its URL prefix, or a command (download.py). A shard is downloaded when it is read
or about to be, once a node however many processes want it, held against size and hash in
index.json, and renamed when it is whole. Where the cache is full the shards go that were not used
for longest, but never one that is open in some process.

D2V_CACHE names the cache's folder, D2V_CACHE_BYTES its size (200GB).
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

log = logging.getLogger("d2v_ds")

DEFAULT_BYTES = "200GB"
TOGETHER = 16  # downloads of indexes at a time
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


@dataclasses.dataclass(frozen=True)
class Cache:
    """A folder of this node and how many bytes of shards it may hold."""

    folder: Path
    limit: int

    @staticmethod
    def from_environment() -> Cache:
        """Raises UserError."""
        own = Path(tempfile.gettempdir(), f"d2v_ds-{os.getuid()}")
        text = os.environ.get("D2V_CACHE_BYTES", DEFAULT_BYTES)
        found = re.fullmatch(r"(\d+) *([KMGT]B)?", text)
        if not found:
            raise UserError(f"D2V_CACHE_BYTES: {text!r} is no size; give one like 200GB")
        folder = Path(os.environ.get("D2V_CACHE") or own)
        return Cache(folder, int(found[1]) * UNITS[found[2] or ""])


def open_remote(where: str, modality: str = "", cache: Cache | None = None) -> ShardSet:
    """The set at a URL prefix; its indexes are downloaded, its tars are not. Raises UserError."""
    cache = cache or Cache.from_environment()
    content = try_again(lambda: read_all(url_of(where, INDEX_FILE)), url_of(where, INDEX_FILE))
    name = re.sub(r"\W+", "_", where.rstrip("/").rpartition("/")[2])[:40]
    folder = cache.folder / f"{name}-{hashlib.sha256(where.encode() + content).hexdigest()[:16]}"
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / ".lock"):
            aside = folder / f"{INDEX_FILE}.tmp"
            if not (folder / INDEX_FILE).exists():
                aside.write_bytes(content)
                aside.replace(folder / INDEX_FILE)
            shards = open_set(folder, modality, check_tars=False)
            shards = dataclasses.replace(shards, remote=where)
            with ThreadPoolExecutor(TOGETHER) as pool:
                list(pool.map(lambda entry: _fetch_index(shards, entry), shards.shards))
    return shards


def open_shard(shards: ShardSet, entry: ShardEntry, cache: Cache | None = None) -> int:
    """A file descriptor of one of its tars, which stays in the cache as long as that is open.

    Raises UserError when it cannot be downloaded or is not what index.json says.
    """
    path = shards.tar(entry)
    while True:
        with contextlib.suppress(FileNotFoundError):
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            fcntl.flock(file, fcntl.LOCK_SH)
            if os.fstat(file).st_nlink:
                os.utime(file)  # used now
                return file
            os.close(file)  # it was removed before it was locked
        with writing(path.parent), _locked(path.with_suffix(".lock")):
            if not path.exists():
                _fetch_shard(shards, entry, cache or Cache.from_environment())


def keep_near(shards: ShardSet, upcoming: Iterable[int], cache: Cache | None = None) -> None:
    """Downloads the shards that come next, by number, as far as they fill half of the cache, and
    tells that the ones already there are needed."""
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
    """A folder in the cache for files that are this process's alone: removed when it is closed, or,
    should the process be killed, when the next one makes such a folder. It does not count in the
    cache's size. Raises UserError."""

    def __init__(self, cache: Cache | None = None) -> None:
        parent = (cache or Cache.from_environment()).folder / "own"
        with writing(parent):
            parent.mkdir(parents=True, exist_ok=True)
            with _locked(parent / ".lock"):
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
                raise UserError(
                    f"{url}: is not what {INDEX_FILE} says (its SHA-256 differs); upload it again"
                )

        try:
            try_again(whole, url)
            aside.rename(path)
        except BaseException:
            aside.unlink()
            raise


# --------------------------------------------------------------------------------------- the folder


@contextlib.contextmanager
def _room_for(aside: Path, size: int, cache: Cache) -> Iterator[BinaryIO]:
    """An open file of that size, for which others have made room."""
    with _locked(cache.folder / ".lock"):
        _evict(cache, size)
        file = aside.open("wb")
        fcntl.flock(file, fcntl.LOCK_EX)  # who holds it is at work on it
        file.truncate(size)
    with file:
        yield file


def _evict(cache: Cache, size: int) -> None:
    """Removes shards until `size` bytes more fit, those not used for longest first."""
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
            "%s holds %.3g GB of shards that are all in use, D2V_CACHE_BYTES allows %.3g GB with "
            "the next one; raise it, or the same shards will be downloaded again and again",
            cache.folder,
            (held + size) / 1e9,
            cache.limit / 1e9,
        )


def _stat(file: Path) -> os.stat_result | None:
    try:
        return file.stat()
    except FileNotFoundError:
        return None


def _remove_unused(path: Path) -> bool:
    """Removes a file, or a folder with all that is in it, that no process has locked."""
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
def _locked(file: Path) -> Iterator[None]:
    with file.open("w") as opened:
        fcntl.flock(opened, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """This machine's errors as UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"D2V_CACHE: cannot write {folder} ({error.strerror or error})") from None
