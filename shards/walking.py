"""Files below a folder, always in the same order."""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from d2v_ds.data.checks import Finding, Unusable
from d2v_ds.data.shard_format import INDEX_FILE, PLAN_FILE
from d2v_ds.errors import UserError
from shards.tars import how_to_unpack, unpacker

PLAN_START = b'{"plan": "'  # the first bytes of the file that shards/core.py writes
SPECIAL = "is a pipe, socket or device"
NOT_READ = "is not a type of file that is read"


class FoundFile(NamedTuple):
    path: str  # relative to the folder that is walked
    name: str
    size: int  # bytes; 0 if unknown
    place: tuple[int, int] | None = None  # the same for all links to a file; None if unknown


def folders(
    root: Path, findings: list[Finding] | None = None, pruned: Collection[str] = ()
) -> Iterator[tuple[str, list[str]]]:
    """(folder, names of its files), sorted. Links are followed and each folder is visited once.
    Hidden files and folders, and links to folders that were visited, are skipped and added to
    `findings`. pruned: names of folders in `root` to leave to the caller. Raises UserError for a
    folder that cannot be read, since its files would be missing."""
    visited: dict[tuple[int, int], str] = {}
    skipped = [] if findings is None else findings

    def skip(folder: str, name: str, kind: str, reason: str) -> None:
        skipped.append(Finding(os.path.relpath(os.path.join(folder, name), root), reason, kind))

    for folder, names, files in os.walk(root, followlinks=True, onerror=_unreadable):
        status = os.stat(folder)
        first = visited.setdefault((status.st_dev, status.st_ino), folder)
        if first != folder:
            skip(folder, "", "linked twice", f"is a link to {os.path.relpath(first, root)}")
            names.clear()
            continue
        for name in sorted(name for name in (*names, *files) if name.startswith(".")):
            skip(folder, name, "hidden", "its name begins with a dot")
        if folder != os.fspath(root) and _is_shard_set(folder, files):
            skip(folder, "", "shard set", "is a shard set, such as OUT of a conversion")
            names.clear()
            continue
        names[:] = sorted(name for name in names if not name.startswith("."))
        if folder == os.fspath(root):
            names[:] = [name for name in names if name not in pruned]
        yield folder, sorted(name for name in files if not name.startswith("."))


def _is_shard_set(folder: str, names: Collection[str]) -> bool:
    """Whether a folder holds a shard set, or a conversion that was interrupted, perhaps before its
    first shard was written."""
    if PLAN_FILE in names:
        try:
            with open(os.path.join(folder, PLAN_FILE), "rb") as file:
                return file.read(len(PLAN_START)) == PLAN_START
        except OSError:  # the conversion reports the reason
            pass
    return INDEX_FILE in names and any(name.endswith(".idx") for name in names)


def _unreadable(error: OSError) -> None:
    raise UserError(
        f"{error.filename}: this folder cannot be read ({error.strerror}), so its files would be "
        "missing. Correct its permissions, or move it out of SOURCE"
    )


def walk(root: Path, findings: list[Finding] | None = None) -> Iterator[FoundFile]:
    """Every file below a folder. findings: as for `folders`; pipes, sockets and devices are added
    too, because reading them may never end."""
    for folder, names in folders(root, findings):
        # Once per folder, because this takes as long as the rest of the loop.
        below = os.path.relpath(folder, root)
        before = "" if below == os.curdir else os.path.join(below, "")
        start = os.path.join(folder, "")
        for name in names:
            size, place, is_special = 0, None, False
            try:
                status = os.stat(start + name)
                size, is_special = status.st_size, not stat.S_ISREG(status.st_mode)
                place = status.st_dev, status.st_ino
            except OSError:  # the conversion reports the reason
                pass
            if not is_special:
                yield FoundFile(before + name, name, size, place)
            elif findings is not None:
                findings.append(Finding(before + name, SPECIAL, "type"))


def wanted(
    root: Path,
    files: Iterable[FoundFile],
    is_wanted: Callable[[str], bool],
    kinds: str,
    findings: list[Finding],
) -> Iterator[FoundFile]:
    """The files with a wanted name; the others are added to `findings`. Raises UserError, listing
    the others, if there are none."""
    others: Counter[str] = Counter()
    packed = ""  # a compressed tar
    empty = True
    for file in files:
        if is_wanted(file.name):
            empty = False
            yield file
        else:
            others[extension_of(file.name) or file.name] += 1
            reason = how_to_unpack(file.name) if unpacker(file.name) else NOT_READ
            packed = packed or (file.path if reason != NOT_READ else "")
            findings.append(Finding(file.path, reason, "type"))
    if empty:
        found = ", ".join(f"{n} {kind}" for kind, n in others.most_common(5)) or "nothing"
        more = f"; {packed} {how_to_unpack(os.path.basename(packed))}" if packed else ""
        raise UserError(f"{root}: contains no {kinds} file (found: {found}){more}")


def extension_of(name: str) -> str:
    """In lower case, with the dot."""
    return os.path.splitext(name)[1].lower()


def size_of(path: str | Path) -> int:
    """In bytes; 0 if the file cannot be read, because the conversion reports the reason."""
    try:
        return os.stat(path).st_size
    except (OSError, ValueError):  # ValueError: a NUL character
        return 0


def is_special(path: str | Path) -> bool:
    """Whether it is a pipe, socket or device, so that reading it may never end."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):  # the conversion reports the reason
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def check_file(path: str | Path) -> None:
    """Raises Unusable for everything but a regular file, and OSError if it is missing."""
    if "\0" in os.fspath(path):
        raise Unusable("row", "its path has NUL characters")
    if not stat.S_ISREG(os.stat(path).st_mode):
        what = SPECIAL if is_special(path) else "is a folder"
        raise Unusable("unreadable", f"{what}, not a file")


def first_folder(root: Path, extensions: Collection[str]) -> tuple[Path, list[str]]:
    """The first folder that contains a file with one of the extensions, and its file names."""
    for folder, names in folders(root):
        if any(extension_of(name) in extensions for name in names):
            return Path(folder), names
    return root, []
