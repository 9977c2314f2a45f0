"""Files below a folder, always in the same order."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from d2v_ds.errors import UserError


class FoundFile(NamedTuple):
    path: str  # relative to the folder that is walked
    name: str
    size: int  # bytes; 0 if unknown


def folders(root: Path) -> Iterator[tuple[str, list[str]]]:
    """(folder, names of its files), sorted. Links are followed and each folder is visited once.
    Hidden files and folders are skipped."""
    visited = set()
    for folder, names, files in os.walk(root, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in visited:
            names.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        names[:] = sorted(name for name in names if not name.startswith("."))
        yield folder, sorted(name for name in files if not name.startswith("."))


def walk(root: Path) -> Iterator[FoundFile]:
    """Every file below a folder."""
    for folder, names in folders(root):
        # Once per folder, because this takes as long as the rest of the loop.
        below = os.path.relpath(folder, root)
        before = "" if below == os.curdir else os.path.join(below, "")
        start = os.path.join(folder, "")
        for name in names:
            yield FoundFile(before + name, name, size_of(start + name))


def wanted(
    root: Path, files: Iterable[FoundFile], is_wanted: Callable[[str], bool], kinds: str
) -> Iterator[FoundFile]:
    """The files with a wanted name. Raises UserError, listing other files, if there are none."""
    others: Counter[str] = Counter()
    empty = True
    for file in files:
        if is_wanted(file.name):
            empty = False
            yield file
        else:
            others[extension_of(file.name) or file.name] += 1
    if empty:
        found = ", ".join(f"{n} {kind}" for kind, n in others.most_common(5)) or "nothing"
        raise UserError(f"{root}: contains no {kinds} file (found: {found})")


def extension_of(name: str) -> str:
    """In lower case, with the dot."""
    return os.path.splitext(name)[1].lower()


def size_of(path: str | Path) -> int:
    """In bytes; 0 if the file cannot be read, because the conversion reports the reason."""
    try:
        return os.stat(path).st_size
    except OSError:
        return 0


def first_folder(root: Path, extensions: Collection[str]) -> tuple[Path, list[str]]:
    """The first folder that contains a file with one of the extensions, and its file names."""
    for folder, names in folders(root):
        if any(extension_of(name) in extensions for name in names):
            return Path(folder), names
    return root, []
