"""Third-party tars as inputs: a member is a byte range of its tar, so nothing is unpacked."""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

from d2v_ds.data.tar_scan import DamagedTar, Member, members, next_header
from shards.family import Rejected


def sound_members(
    file: BinaryIO, name: str, rejected: list[Rejected], start: int = 0, end: int | None = None
) -> Iterator[Member]:
    """Members of the tar in bytes `start` to `end` of a file. Damage is appended to `rejected`, and
    the scan continues at the next intact header."""
    at: int | None = start
    while at is not None and (end is None or at < end):
        try:
            yield from members(file, at, end)
            return
        except DamagedTar as error:
            rejected.append((name, f"{error}: its content is lost"))
            at = next_header(file, error.offset)
