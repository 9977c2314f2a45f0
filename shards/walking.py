"""Files below a folder, always in the same order."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from pathlib import Path

AUDIO = (".wav", ".flac", ".mp3", ".ogg", ".opus")


def folders(root: Path) -> Iterator[tuple[str, list[str]]]:
    """(folder, names of its files), sorted; links are followed, each folder visited once, hidden
    ones (what file managers leave) are not seen."""
    visited = set()
    for folder, names, files in os.walk(root, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in visited:
            names.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        names[:] = sorted(name for name in names if not name.startswith("."))
        yield folder, sorted(name for name in files if not name.startswith("."))


def walk(root: Path) -> Iterator[tuple[str, str, int]]:
    """(path relative to root, name, bytes) of every file."""
    for folder, names in folders(root):
        # Once a folder, for these take as long as all the rest.
        below = os.path.relpath(folder, root)
        before = "" if below == os.curdir else os.path.join(below, "")
        start = os.path.join(folder, "")
        for name in names:
            yield before + name, name, size_of(start + name)


def size_of(path: str | Path) -> int:
    try:
        return os.stat(path).st_size
    except OSError:  # converting it will say why
        return 0


def first_folder(root: Path, extensions: Collection[str]) -> tuple[Path, list[str]]:
    """The first one that has a file of such an extension, and the names in it."""
    for folder, names in folders(root):
        if any(os.path.splitext(name)[1].lower() in extensions for name in names):
            return Path(folder), names
    return root, []
