"""An index for WebDataset tars that others made, from headers alone: nothing is copied or decoded.

    NAME.tar ... -> members (tar_scan.py), lengths (from the payloads' own headers) -> NAME.idx ...,
    index.json: a shard set as shard_format.py has it, beside the tars or in a folder of its own

Lengths: WAV (RIFF), FLAC (RFC 9639, section 8.2), JPEG (T.81, B.2.2), PNG (section 11.2.2 of its
specification), WebP (RFC 9649), .npy (numpy.lib.format). Standard library only.
"""

from __future__ import annotations

import ast
import json
import os
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO, NamedTuple

from d2v_ds.data.checksum import checksum_of
from d2v_ds.data.shard_format import INDEX_FILE, ShardEntry, ShardSet, index_bytes, set_json
from d2v_ds.data.tar_scan import DamagedTar, Member, members, samples
from d2v_ds.errors import UserError
from d2v_ds.files import write_atomically

BESIDE = ("cls", "json", "txt")  # what lies beside a payload and goes along
MAX_BAD = 0.01  # of the samples, without a length
FEW = 3  # names in a message


class Length(NamedTuple):
    length: int
    rate: int = 0


@dataclass(frozen=True)
class Kind:
    """Of a modality: what its samples are read from."""

    unit: str
    fields: dict[str, Callable[[BinaryIO, Member], Length]]  # how to tell the length of each

    @property
    def all_fields(self) -> tuple[str, ...]:
        return tuple(sorted((*self.fields, *BESIDE)))


@dataclass(frozen=True)
class Indexed:
    """One tar."""

    entry: ShardEntry
    idx: bytes  # content of NAME.idx
    sample_rate: int
    left_out: tuple[tuple[str, str], ...]  # (key, reason)


def index_set(
    tars: Sequence[Path],
    out: Path,
    modality: str = "",
    checksum: str = "none",
    run: Callable[..., Iterable[Indexed]] = map,
) -> ShardSet:
    """Writes an .idx for each tar, then index.json, into `out`; the tars stay where they are.

    modality: "" to tell it from the first tar's members. checksum: "none", or a kind that
    checksum.py knows, which reads every payload. run: `map`, or one that works in parallel and in
    any order. Raises UserError when there are no tars, when they lie in several folders, when one
    is damaged, has samples at several rates or none, and when a set is there already.
    """
    if not tars:
        raise UserError(f"{out}: no tars to index")
    folders = {tar.parent.resolve() for tar in tars}
    if len(folders) > 1:
        raise UserError("the tars of one set lie in one folder; index each folder for itself")
    if (out / INDEX_FILE).exists():
        raise UserError(f"{out}: is a shard set already; delete its {INDEX_FILE} to index it anew")
    modality = modality or guess_modality(tars[0])
    out.mkdir(parents=True, exist_ok=True)
    entries, left_out, rates = [], [], dict[int, str]()
    for indexed in run(index_tar, [(tar, modality, checksum) for tar in tars]):
        entry = indexed.entry
        rates.setdefault(indexed.sample_rate, entry.name)
        left_out += [(f"{entry.name}.tar, {key}", reason) for key, reason in indexed.left_out]
        entries.append(entry)
        write_atomically(out / f"{entry.name}.idx", indexed.idx)
    if len(rates) > 1:
        found = ", ".join(f"{rate} Hz in {name}.tar" for rate, name in sorted(rates.items()))
        raise UserError(f"{out}: the set needs one sample rate ({found}); {_convert(modality)}")
    entries.sort(key=lambda entry: entry.name)
    inputs = sum(entry.samples for entry in entries) + len(left_out)
    write_atomically(
        out / "quarantine.jsonl",
        "".join(json.dumps({"path": p, "reason": r}) + "\n" for p, r in sorted(left_out)).encode(),
    )
    if len(left_out) > MAX_BAD * inputs:
        name, reason = min(left_out)
        raise UserError(
            f"{out}: {len(left_out)} of {inputs} samples cannot be used; the first: {name}: "
            f"{reason}; all are in {out / 'quarantine.jsonl'}"
        )
    (folder,) = folders
    result = ShardSet(
        out,
        modality,
        KINDS[modality].unit,
        next(iter(rates)),
        KINDS[modality].all_fields,
        tuple(entry for entry in entries if entry.samples),
        None if folder == out.resolve() else folder,
    )
    about = {"indexed": True, "inputs": inputs, "quarantined": len(left_out), "options": {}}
    write_atomically(out / INDEX_FILE, set_json(result, **about).encode())
    return result


def guess_modality(tar: Path) -> str:
    """By the members of the first sample. Raises UserError."""
    with tar.open("rb") as file:
        try:
            _, group = next(samples(members(file)), ("", {}))
        except DamagedTar as error:
            raise UserError(f"{tar}: {error}; copy it again") from None
    found = [name for name, kind in KINDS.items() if group.keys() & kind.fields.keys()]
    if len(found) != 1:
        known = "; ".join(f"{name}: {', '.join(kind.fields)}" for name, kind in KINDS.items())
        raise UserError(
            f"{tar}: its first sample has {', '.join(group) or 'no members'}, which tells no "
            f"modality ({known}); give one with --modality, or convert the tars with "
            "`d2v-shards speech|images --layout webdataset`"
        )
    return found[0]


def index_tar(job: tuple[Path, str, str], one_rate: bool = True) -> Indexed:
    """(tar, modality, kind of checksum) -> its index; one_rate: samples that are not at the rate of
    the first one are left out. Raises UserError."""
    tar, modality, kind = job
    names, checksum = KINDS[modality].all_fields, checksum_of(kind)
    keys: list[str] = []
    offsets, sizes, checksums, lengths = array("q"), array("I"), array("I"), array("I")
    left_out: list[tuple[str, str]] = []
    rate = 0
    with tar.open("rb") as file:
        try:
            for key, group in samples(members(file)):
                try:
                    length = _length(file, group, KINDS[modality])
                    rate = rate or length.rate
                    if one_rate and length.rate != rate:
                        raise ValueError(f"is at {length.rate} Hz, those before it at {rate} Hz")
                except ValueError as error:
                    left_out.append((key, str(error)))
                    continue
                keys.append(key)
                lengths.append(length.length)
                for name in names:
                    member = group.get(name)
                    offsets.append(member.offset if member else 0)
                    sizes.append(member.size if member else 0)
                    data = _payload(file, member) if checksum and member else b""
                    checksums.append(checksum(data) if checksum and member else 0)
        except DamagedTar as error:
            raise UserError(
                f"{tar}: {error}; copy it again, or convert what is left: {_convert(modality)}"
            ) from None
        size = file.seek(0, os.SEEK_END)
    idx = index_bytes(names, size, keys, offsets, sizes, checksums, lengths, kind)
    digest = sha256(idx).hexdigest()  # of the index: the tar was not read
    entry = ShardEntry(tar.stem, len(keys), size, sum(lengths), digest)
    return Indexed(entry, idx, rate, tuple(left_out))


def _convert(modality: str) -> str:
    family = {"vision": "images"}.get(modality, modality)
    return f"`d2v-shards {family} SOURCE OUT --layout webdataset`"


# ------------------------------------------------------------------------------------------ lengths


def _length(file: BinaryIO, group: dict[str, Member], kind: Kind) -> Length:
    """Raises ValueError."""
    for name, read in kind.fields.items():
        if name in group:
            length = read(file, group[name])
            if not 0 < length.length < 1 << 32 or max(m.size for m in group.values()) >= 1 << 32:
                raise ValueError(f".{name}: {length.length} {kind.unit} or its bytes are too many")
            return length
    raise ValueError(f"has only {', '.join(group)}, none of {', '.join(kind.fields)}")


def _payload(file: BinaryIO, member: Member, first: int = 0, number: int = -1) -> bytes:
    file.seek(member.offset + first)
    left = max(0, member.size - first)
    return file.read(left if number < 0 else min(number, left))


def flac(file: BinaryIO, member: Member) -> Length:
    head = _payload(file, member, 0, 26)
    if len(head) < 26 or head[:4] != b"fLaC" or head[4] & 0x7F:
        raise ValueError(".flac: is no FLAC")
    packed = int.from_bytes(head[18:26], "big")  # 20 bits rate, 3 channels, 5 depth, 36 frames
    if not packed & (1 << 36) - 1:
        raise ValueError(".flac: does not say how long it is (streamed FLAC)")
    return Length(packed & (1 << 36) - 1, packed >> 44)


def wav(file: BinaryIO, member: Member) -> Length:
    head = _payload(file, member, 0, 12)
    if head[:4] != b"RIFF" or head[8:] != b"WAVE":
        raise ValueError(".wav: is no WAV")
    at, rate, frame = 12, 0, 0
    while len(chunk := _payload(file, member, at, 8)) == 8:
        name, size = chunk[:4], int.from_bytes(chunk[4:], "little")
        if name == b"fmt ":
            about = _payload(file, member, at + 8, 16)
            rate, frame = (int.from_bytes(about[i:j], "little") for i, j in ((4, 8), (12, 14)))
        if name == b"data":
            if at + 8 + size > member.size:
                raise ValueError(f".wav: is truncated, its data has {size} bytes by its header")
            if not frame:
                raise ValueError(".wav: has no format before its data")
            return Length(size // frame, rate)
        at += 8 + size + size % 2
    raise ValueError(".wav: has no data")


def jpeg(file: BinaryIO, member: Member) -> Length:
    at = 2
    if _payload(file, member, 0, 2) != b"\xff\xd8":
        raise ValueError(".jpg: is no JPEG")
    while len(head := _payload(file, member, at, 9)) == 9 and head[0] == 0xFF:
        marker = head[1]
        if marker == 0xFF:  # padding
            at += 1
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # start of frame
            return Length(int.from_bytes(head[5:7], "big") * int.from_bytes(head[7:9], "big"))
        else:
            at += 2 + (0 if 0xD0 <= marker <= 0xD8 else int.from_bytes(head[2:4], "big"))
    raise ValueError(".jpg: has no frame header")


def png(file: BinaryIO, member: Member) -> Length:
    head = _payload(file, member, 0, 24)
    if len(head) < 24 or head[:8] != b"\x89PNG\r\n\x1a\n":
        raise ValueError(".png: is no PNG")
    return Length(int.from_bytes(head[16:20], "big") * int.from_bytes(head[20:24], "big"))


def webp(file: BinaryIO, member: Member) -> Length:
    head = _payload(file, member, 0, 30)
    if len(head) < 30 or head[:4] + head[8:12] != b"RIFFWEBP":
        raise ValueError(".webp: is no WebP")
    if head[12:16] == b"VP8X":  # 24 bits each, less 1
        width, height = (int.from_bytes(head[i : i + 3], "little") + 1 for i in (24, 27))
    elif head[12:16] == b"VP8L":  # 14 bits each, less 1
        packed = int.from_bytes(head[21:25], "little")
        width, height = (packed & 0x3FFF) + 1, (packed >> 14 & 0x3FFF) + 1
    else:
        width, height = (int.from_bytes(head[i : i + 2], "little") & 0x3FFF for i in (26, 28))
    return Length(width * height)


def npy(file: BinaryIO, member: Member) -> Length:
    head = _payload(file, member, 0, 12)
    wide = head[6:7] > b"\x01"  # version 2 and 3
    start = 12 if wide else 10
    try:
        if head[:6] != b"\x93NUMPY":
            raise ValueError("is no array")
        text = _payload(file, member, start, int.from_bytes(head[8:start], "little"))
        about = ast.literal_eval(text.decode("latin-1").strip())
        (number,), width = about["shape"], int(about["descr"][2:])
    except (ValueError, SyntaxError, TypeError, KeyError, IndexError, MemoryError) as error:
        raise ValueError(f".npy: cannot be read ({error})") from None
    if start + len(text) + number * width > member.size:
        raise ValueError(".npy: is truncated")
    return Length(number)


KINDS = {
    "speech": Kind("frames", {"flac": flac, "wav": wav}),
    "vision": Kind("pixels", {"jpg": jpeg, "jpeg": jpeg, "png": png, "webp": webp}),
    "text": Kind("tokens", {"npy": npy}),
}
