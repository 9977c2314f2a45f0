"""Third-party tars as inputs: a member is a byte range of its tar, so nothing is unpacked."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from d2v_ds.data.checks import Finding
from d2v_ds.data.headers import SIDE_FIELDS
from d2v_ds.data.tar_scan import (
    UNUSED,
    DamagedTar,
    Member,
    about_unused,
    members,
    samples,
    without_dots,
)
from d2v_ds.errors import UserError

TAR = ".tar"
UNPACKERS = {  # by the endings of names
    (".tar.gz", ".tgz"): "gunzip",
    (".tar.bz2", ".tbz2", ".tbz"): "bunzip2",
    (".tar.xz", ".txz"): "unxz",
    (".tar.zst", ".tzst"): "unzstd",
}
MAGIC = {b"\x1f\x8b": ".gz", b"BZh": ".bz2", b"\xfd7zXZ\0": ".xz", b"\x28\xb5\x2f\xfd": ".zst"}


def sound_members(
    file: BinaryIO, name: str, findings: list[Finding], start: int = 0, end: int | None = None
) -> Iterator[Member]:
    """Members of the tar in bytes `start` to `end` of a file whose payload can be read. Damage, and
    members whose payload cannot be read, are appended to `findings`."""
    for member in all_members(file, name, findings, start, end):
        if member.problem:
            kind, reason = member.problem
            findings.append(Finding(f"{name}, {member.name}", reason, kind))
        else:
            yield member


def all_members(
    file: BinaryIO, name: str, findings: list[Finding], start: int = 0, end: int | None = None
) -> Iterator[Member]:
    """As `sound_members`, with those whose payload cannot be read, which have a `problem`."""
    compression = compression_of(file)
    if compression and not start:
        findings.append(Finding(name, how_to_unpack(name, compression), "format"))
        return
    damage: list[DamagedTar] = []
    empty = True
    for member in members(file, start, end, damage):
        empty = False
        yield member
    if empty and (not damage or not file.seek(0, os.SEEK_END)):
        findings.append(Finding(name, "is a tar without files", "empty"))
        return
    for error in damage:
        findings.append(Finding(name, f"{error}; only what is intact is used", "damaged"))


def grouped(
    file: BinaryIO,
    name: str,
    fields: Sequence[str],
    content: str,
    findings: list[Finding],
    single: bool = False,
) -> Iterator[tuple[str, str, dict[str, Member]]]:
    """(key, field, members) of each WebDataset sample of a tar. `field` is the first of `fields`
    that the sample has, its recording or image; `members` holds this member and its json, txt and
    cls. Other samples and members are appended to `findings`. content: what the fields hold, for
    messages. single: leave out samples with several of the fields, such as an image and a mask."""
    unused: list[Member] = []
    for key, group in samples(all_members(file, name, findings), unused):
        where = f"{name}, {key}"
        field = next(filter(group.__contains__, fields), "")
        if not field:
            dotted = [f".{name}" for name in group if without_dots(key, [name], fields)]
            for ending in dotted or [""]:
                reason = f"has no {content}, only {ending[1:] or ', '.join(group)}"
                reason += without_dots(key, [ending[1:]], fields)
                findings.append(Finding(where + ending, reason, "row"))
            continue
        if single and (number := sum(name in group for name in fields)) > 1:
            reason = f"has {number} {content}s, expected one ({', '.join(group)})"
            findings.append(Finding(where, reason, "row"))
            continue
        if problem := group[field].problem:
            findings.append(Finding(f"{where}.{field}", problem.reason, problem.kind))
            continue
        if len(group) > 1:
            _keep_side_fields(group, field, where, content, findings)
        yield key, field, group
    findings += [about_unused(member, f"{name}, ") for member in unused]


def _keep_side_fields(
    group: dict[str, Member], field: str, where: str, content: str, findings: list[Finding]
) -> None:
    for other, member in list(group.items()):
        if other == field:
            continue
        if other not in SIDE_FIELDS:
            findings.append(Finding(f"{where}.{other}", UNUSED, "unused"))
            group.pop(other)
        elif problem := member.problem:
            reason = f"{problem.reason}; the {content} is kept without it"
            findings.append(Finding(f"{where}.{other}", reason, "no metadata"))
            group.pop(other)


# ------------------------------------------------------------------------------- compressed tars


def compression_of(file: BinaryIO) -> str:
    """The extension that belongs to the content of a compressed file; "" if it is none."""
    file.seek(0)
    first = file.read(6)
    return next((extension for magic, extension in MAGIC.items() if first.startswith(magic)), "")


def unpacker(name: str) -> str:
    """The command that unpacks a compressed tar; "" if the name is not one of a compressed tar."""
    name = name.lower()
    return next((command for ends, command in UNPACKERS.items() if name.endswith(ends)), "")


def how_to_unpack(name: str, compression: str = "") -> str:
    """What to do with a compressed tar. compression: what its content says, if it has another
    name."""
    if command := unpacker(name):
        return f"is a compressed tar; unpack it with `{command} {name}`"
    command = unpacker(f"{TAR}{compression}")
    return (
        f"is not a tar but compressed; rename it to {name}{compression} and unpack it with "
        f"`{command} {name}{compression}`"
    )


def refuse_compressed(source: Path) -> None:
    """Raises UserError if SOURCE is a compressed tar."""
    if not source.is_file():
        return
    compression = ""
    if source.suffix.lower() == TAR:
        with source.open("rb") as file:
            compression = compression_of(file)
    if compression or unpacker(source.name):
        reason = how_to_unpack(source.name, compression)
        raise UserError(f"{source}: {reason}. Its samples cannot be read at random otherwise")
