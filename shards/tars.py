"""Third-party tars as inputs: a member is a byte range of its tar, so nothing is unpacked."""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

from d2v_ds.data.checks import Finding
from d2v_ds.data.tar_scan import DamagedTar, Member, members, next_header


def sound_members(
    file: BinaryIO, name: str, findings: list[Finding], start: int = 0, end: int | None = None
) -> Iterator[Member]:
    """Members of the tar in bytes `start` to `end` of a file. Damage is appended to `findings`, and
    the scan continues at the next intact header."""
    at: int | None = start
    while at is not None and (end is None or at < end):
        try:
            yield from members(file, at, end)
            return
        except DamagedTar as error:
            findings.append(Finding(name, f"{error}: its content is lost", "damaged"))
            at = next_header(file, error.offset)
