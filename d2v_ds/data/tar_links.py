"""Links within a tar: the payload of a hard link or symbolic link is that of its target.

A hard link names a member of the tar; a symbolic link names a path relative to its own folder, and
may lead through other links (POSIX.1-2017, pax, ustar interchange format). Standard library only.
"""

from __future__ import annotations

import posixpath
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from typing import NamedTuple

HOPS = 40  # links that may follow one another, as in Linux (path_resolution(7))
STEPS = 1000  # folders that are entered to find a target; a path of 4,096 bytes has fewer
HARD, SYMBOLIC, FOLDER = b"1", b"2", b"5"  # types of headers


class Problem(NamedTuple):
    """Why the payload of a member cannot be read. kind: a name in LEFT_OUT of checks.py, or
    "type"."""

    kind: str
    reason: str


class _Place(NamedTuple):
    """What the tar holds at a path."""

    offset: int
    size: int
    link: str = ""  # a path within the tar; "": a file


class LinkTable:
    """The members of a tar by their path. Only built for tars with links."""

    def __init__(self, entries: Iterable[tuple[str, int, int, bytes, str, bool]]) -> None:
        self._places: dict[str, list[_Place]] = {}
        self._symbolic: dict[str, str] = {}  # {path: its target, relative to its folder}
        self._sparse: set[str] = set()
        paths: set[str] = set()
        for name, offset, size, kind, link, sparse in entries:
            path = normal(name)
            paths.add(path + "/" * (kind == FOLDER))
            if kind == SYMBOLIC:
                self._symbolic[path] = link
            elif kind != FOLDER and sparse:
                self._sparse.add(path)
            elif kind != FOLDER:
                target = normal(link) if kind == HARD else ""
                self._places.setdefault(path, []).append(_Place(offset, size, target))
        self._sorted = sorted(paths)  # those of folders end in a slash

    def _is_folder(self, path: str) -> bool:
        """Whether the tar holds the folder, or something in it."""
        inside = path + "/"
        at = bisect_left(self._sorted, inside)
        return at < len(self._sorted) and self._sorted[at].startswith(inside)

    def target(
        self, name: str, offset: int, link: str, symbolic: bool
    ) -> tuple[int, int] | Problem | None:
        """(offset, size) of the payload that the link at byte `offset` leads to; why there is
        none; or None for a link to a folder."""
        path = normal(name)
        if not symbolic:
            path = normal(link)
        missing = Problem("link", f"is a link to {link}, which the tar does not contain")
        steps = iter(range(STEPS))
        for _ in range(HOPS):
            resolved = self._through_links(path, steps)
            if resolved is None:
                return missing
            path = resolved
            if path in self._sparse:
                return Problem("format", f"is a link to {link}, which is stored as a sparse file")
            if path not in self._places:
                return None if symbolic and self._is_folder(path) else missing
            # Of several members with one name, the last one before the link; else the first.
            places = self._places[path]
            place = next((p for p in reversed(places) if p.offset < offset), places[0])
            if not place.link:
                return place.offset, place.size
            path, offset = place.link, place.offset
        return Problem("link", f"is a link to {link}, which leads back to itself")

    def _through_links(self, path: str, steps: Iterator[int]) -> str | None:
        """The path without symbolic links; None if it leaves the tar or never ends. steps: one is
        taken for each folder."""
        done = ""
        rest = path.split("/")[::-1]  # the next folder is the last
        hops = 0
        while rest:
            part = rest.pop()
            if next(steps, None) is None or (part == ".." and not done):
                return None
            if part == "..":
                done = posixpath.dirname(done)
            elif part not in ("", "."):
                done = f"{done}/{part}" if done else part
            if done in self._symbolic:
                hops += 1
                link = self._symbolic[done]
                if hops > HOPS or link.startswith("/"):
                    return None
                rest += link.split("/")[::-1]
                done = posixpath.dirname(done)
        return done


def normal(name: str) -> str:
    """A path without `./`, a leading `/` and a trailing `/`."""
    if name[:1] not in "./" and "/." not in name and "//" not in name:
        return name.rstrip("/")  # most names
    path = posixpath.normpath(name).lstrip("/")
    return "" if path == "." else path
