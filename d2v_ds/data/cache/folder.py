"""Files on a node's own disk that its processes share: written once, complete, within a size.

    path --added--> open temporary file --complete--> path
    Cache.added: the same, within the cache's size

remote.py keeps shards of remote sets there, stage.py copies of local sets; renew.py replaces what
has been damaged since. A file gets its name when all of it is on the disk, also after a power
failure. private.py keeps other users out.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from d2v_ds.data.cache.private import cache_name, chosen, own_folder, private, writing
from d2v_ds.data.shard_format import ShardEntry, ShardSet
from d2v_ds.data.shard_index import read_lengths
from d2v_ds.errors import UserError
from d2v_ds.files import TEMPORARY, format_size, locked, parse_size, sync

log = logging.getLogger("d2v_ds")

DEFAULT_BYTES = "200GB"
LOCK_FILE = ".lock"


@contextlib.contextmanager
def added(path: Path) -> Iterator[BinaryIO]:
    """An open temporary file, NAME.tmp, that becomes `path` unless an error occurs.

    The caller holds a lock on the folder or the file. A killed process leaves a temporary file,
    which the next one replaces.
    """
    with _complete(path, _begin(path)) as file:
        yield file


def _begin(path: Path) -> BinaryIO:
    temporary = path.with_name(path.name + TEMPORARY)
    temporary.unlink(missing_ok=True)
    file = temporary.open("xb")  # a new file, and not through a link
    fcntl.flock(file, fcntl.LOCK_EX)  # locked while it is being written
    return file


@contextlib.contextmanager
def _complete(path: Path, file: BinaryIO) -> Iterator[BinaryIO]:
    temporary = Path(file.name)
    with file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            temporary.replace(path)
            sync(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


@dataclass(frozen=True)
class Cache:
    """A folder of this node, and the maximum size of its shards in bytes."""

    folder: Path
    limit: int

    @staticmethod
    def from_environment() -> Cache:
        """The cache that D2V_CACHE and D2V_CACHE_BYTES describe; its folder is created if needed.
        Raises UserError."""
        try:
            limit = parse_size(os.environ.get("D2V_CACHE_BYTES", DEFAULT_BYTES))
        except ValueError as error:
            raise UserError(f"D2V_CACHE_BYTES: {error}") from None
        if folder := os.environ.get("D2V_CACHE"):
            return Cache(chosen(Path(folder), "D2V_CACHE"), limit)
        return Cache(own_folder(Path(tempfile.gettempdir()), cache_name(), "D2V_CACHE"), limit)

    @contextlib.contextmanager
    def added(self, path: Path, size: int) -> Iterator[BinaryIO]:
        """As `added`, for a shard of `size` bytes, after removing others to make room for it."""
        with locked(self.folder / LOCK_FILE):
            self._evict(size)
            file = _begin(path)
            file.truncate(size)  # so that others see how much it takes
        with _complete(path, file):
            yield file

    def _evict(self, size: int) -> None:
        """Removes the least recently used shards until `size` more bytes fit."""
        files = [*self.folder.glob("*/*.tar"), *self.folder.glob(f"*/*.tar{TEMPORARY}")]
        found = []
        for file in files:
            with contextlib.suppress(FileNotFoundError):  # another process has removed it
                stat = file.stat()
                found.append((stat.st_mtime_ns, stat.st_size, file))
        held = sum(bytes_ for _, bytes_, _ in found)
        for _, bytes_, file in sorted(found):
            if held + size <= self.limit and file.suffix != TEMPORARY:
                continue
            if remove_unused(file):
                held -= bytes_
        if held + size > self.limit:
            log.warning(
                "%s: the shards in use and the next one take %s, but D2V_CACHE_BYTES is %s; raise "
                "it, or the same shards will be downloaded repeatedly",
                self.folder,
                format_size(held + size),
                format_size(self.limit),
            )


def has_index(copy: ShardSet, entry: ShardEntry, advice: str) -> bool:
    """Whether the folder of a copy has the undamaged index of a shard. The log reports a damaged
    one. advice: what happens then."""
    path = copy.index(entry)
    if not os.path.lexists(path):
        return False
    try:
        read_lengths(path, entry, copy.fields, advice)
    except UserError as error:
        log.warning("%s", error)
        return False
    return True


def remove_unused(path: Path) -> bool:
    """Removes a file or folder that no process has locked. Returns whether it was removed."""
    try:
        opened = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:  # it was removed, or is none of ours
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


class OwnFolder:
    """A folder in the cache for temporary files of this process. Raises UserError.

    It is removed by `close` or, if the process is killed, when another process creates such a
    folder. It does not count towards the size of the cache.
    """

    def __init__(self, cache: Cache | None = None) -> None:
        parent = (cache or Cache.from_environment()).folder / "own"
        with writing(parent):
            private(parent, "D2V_CACHE")
            with locked(parent / LOCK_FILE):
                for left in parent.glob("*/"):
                    remove_unused(left)
                self.path = Path(tempfile.mkdtemp(prefix=f"{os.getpid()}-", dir=parent))
                self._lock = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
                fcntl.flock(self._lock, fcntl.LOCK_EX)

    def close(self) -> None:
        if self._lock >= 0:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)
            self._lock = -1
