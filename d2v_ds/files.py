"""Local files: atomic and durable writes, locks, hashes, human-readable sizes, and the data files
of the package.

Standard library only.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.resources
import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Protocol

TEMPORARY = ".tmp"
CHUNK = 1 << 22  # bytes read at a time
WAITING = 0.5  # seconds between attempts to get a lock


def temporary(path: Path) -> Path:
    """The temporary name under which this process writes `path`: NAME.HOST.PID.tmp."""
    return path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}{TEMPORARY}")


def write_atomically(path: Path, data: str | bytes, *, mode: int | None = None) -> None:
    """Replaces a file. If the process ends at any moment, `path` has the old or the new content,
    never a part of it. Once this returns, the new content survives a power failure. mode: the
    permissions of the file, which it has before its content; None: the usual ones."""
    aside = temporary(path)
    if mode is not None:
        aside.touch(mode=mode)
    write_durably(aside, data)
    os.replace(aside, path)
    sync(path.parent)


def write_durably(path: Path, data: str | bytes) -> None:
    """Writes a file whose content survives a power failure once this returns. The name of the file
    survives only after the folder is synced."""
    with path.open("wb") as file:
        file.write(data.encode() if isinstance(data, str) else data)
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Waits until a file's content, or a folder's names, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_stale(folder: Path, *, all_hosts: bool = False) -> None:
    """Removes temporary files that killed processes of this machine left in a folder. all_hosts:
    also removes files of other machines, whose processes must have ended."""
    for file in folder.glob(f"*{TEMPORARY}"):
        host, _, pid = file.name.removesuffix(TEMPORARY).rpartition(".")
        local = host.endswith(f".{socket.gethostname()}")
        if all_hosts or (local and pid.isdecimal() and not _alive(int(pid))):
            file.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextlib.contextmanager
def locked(file: Path, waiting: Callable[[], None] | None = None) -> Iterator[IO[str]]:
    """Holds an exclusive lock on `file`, which is created if needed; yields it open.

    waiting: called repeatedly until the lock is free, and at least once. Raises OSError if the file
    is a link, which may lead to a file of another folder.
    """
    with open(file, "a", opener=_without_links) as opened:
        while waiting:
            waiting()
            try:
                fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(WAITING)
        else:
            fcntl.flock(opened, fcntl.LOCK_EX)
        yield opened


def _without_links(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)


def sha256(path: Path | int) -> str:
    """SHA-256 of a file. path: or an open descriptor, which is read from its beginning, without
    moving it."""
    digest, at = hashlib.sha256(), 0
    descriptor = path if isinstance(path, int) else os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        while chunk := os.pread(descriptor, CHUNK, at):
            digest.update(chunk)
            at += len(chunk)
    finally:
        if descriptor is not path:
            os.close(descriptor)
    return digest.hexdigest()


class Readable(Protocol):
    """What can be read piece by piece; an empty piece is the end."""

    def read(self, size: int, /) -> bytes: ...


def copy(source: Readable, target: IO[bytes], progress: Callable[[int], None]) -> str:
    """Copies the rest of an open file to another one; returns its SHA-256.

    progress: called with the number of bytes read so far, before the last ones are written. It may
    raise an error to end the copy.
    """
    digest, found = hashlib.sha256(), 0
    while chunk := source.read(CHUNK):
        found += len(chunk)
        progress(found)
        digest.update(chunk)
        target.write(chunk)
    return digest.hexdigest()


# -------------------------------------------------------------------------------------------- sizes

SIZE = re.compile(r"(\d+(?:\.\d+)?|\.\d+)\s*(?:([kmgt])(i?)b?|b)?", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Bytes of a size such as 1500, 256MB, 1.5GB, 80G (powers of 1000) or 80GiB (of 1024). Case
    is ignored. Raises ValueError."""
    found = SIZE.fullmatch(text.strip())
    size = 0
    if found:
        base = 1024 if found[3] else 1000
        size = int(float(found[1]) * base ** " kmgt".index((found[2] or " ").lower()))
    if size < 1:
        raise ValueError(f"{text!r} is not a size; give one such as 256MB, 1.5GB or 80GiB")
    return size


def format_size(size: float) -> str:
    """Three digits and a unit: 1.23 GB."""
    for unit in ("B", "KB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.2f} TB"


# ------------------------------------------------------------------------- files of the package


def resource(folder: str, name: str = "") -> Path:
    """A file of ds_configs/ or slurm/, in the installed package or next to it in a checkout."""
    package = Path(str(importlib.resources.files("d2v_ds")))
    for root in (package, package.parent):
        if (root / folder).is_dir():
            return root / folder / name
    raise FileNotFoundError(f"{folder}/ is neither in the package nor next to it")
