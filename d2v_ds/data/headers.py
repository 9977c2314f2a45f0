"""Lengths of samples from the headers of their files; nothing is decoded.

    member of a tar --HeaderReader--> Length (frames, pixels or tokens; sample rate of audio)

WAV (RIFF), FLAC (RFC 9639, section 8.2), JPEG (T.81, B.2.2), PNG (section 11.2.2 of its
specification), WebP (RFC 9649), .npy (numpy.lib.format). Every reader raises Unusable, a
ValueError, with the reason. Standard library only.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import BinaryIO, NamedTuple

from d2v_ds.data.checks import Unusable
from d2v_ds.data.containers import extent_of
from d2v_ds.data.tar_scan import Member


class Length(NamedTuple):
    length: int
    rate: int = 0  # frames per second, of audio


HeaderReader = Callable[[BinaryIO, Member], Length]


@dataclass(frozen=True)
class SampleFormat:
    """The format of a modality's samples in a tar: everything that is needed to index it."""

    modality: str
    length_unit: str
    readers: Mapping[str, HeaderReader]  # by extension, in order of preference
    converter: str = ""  # the d2v-shards command that converts such tars

    @property
    def fields(self) -> tuple[str, ...]:
        """Extensions that the index covers, sorted."""
        return tuple(sorted((*self.readers, *SIDE_FIELDS)))


SIDE_FIELDS = ("cls", "json", "txt")  # members that accompany a sample


def payload(file: BinaryIO, member: Member, first: int = 0, number: int = -1) -> bytes:
    """Bytes of a member, `number` of them (-1: all) from byte `first` on."""
    file.seek(member.offset + first)
    left = max(0, member.size - first)
    return file.read(left if number < 0 else min(number, left))


def flac(file: BinaryIO, member: Member) -> Length:
    head = payload(file, member, 0, 26)
    if len(head) < 26 or head[:4] != b"fLaC" or head[4] & 0x7F:
        raise Unusable("format", ".flac: is not FLAC")
    packed = int.from_bytes(head[18:26], "big")  # 20 bits rate, 3 channels, 5 depth, 36 frames
    if not packed & (1 << 36) - 1:
        raise Unusable("format", ".flac: does not state its length (streamed FLAC)")
    return Length(packed & (1 << 36) - 1, packed >> 44)


def wav(file: BinaryIO, member: Member) -> Length:
    head = payload(file, member, 0, 12)
    if head[:4] not in (b"RIFF", b"RIFX", b"RF64", b"BW64") or head[8:] != b"WAVE":
        raise Unusable("format", ".wav: is not WAV")
    try:
        found = extent_of(lambda at, number: payload(file, member, at, number), member.size)
    except Unusable as error:
        raise Unusable(error.kind, f".wav: {error}") from None
    if not found:
        raise Unusable("empty", ".wav: has no data")
    if not found.frame:
        raise Unusable("format", ".wav: has no format before its data")
    if found.rest:
        raise Unusable(
            "length", f".wav: has {found.rest} bytes behind its samples that no chunk explains"
        )
    return Length(found.size // found.frame, found.rate)


def jpeg(file: BinaryIO, member: Member) -> Length:
    at = 2
    if payload(file, member, 0, 2) != b"\xff\xd8":
        raise ValueError(".jpg: is not JPEG")
    while len(head := payload(file, member, at, 9)) == 9 and head[0] == 0xFF:
        marker = head[1]
        if marker == 0xFF:  # padding
            at += 1
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # start of frame
            return Length(int.from_bytes(head[5:7], "big") * int.from_bytes(head[7:9], "big"))
        else:
            at += 2 + (0 if 0xD0 <= marker <= 0xD8 else int.from_bytes(head[2:4], "big"))
    raise ValueError(".jpg: has no frame header")


def png(file: BinaryIO, member: Member) -> Length:
    head = payload(file, member, 0, 24)
    if len(head) < 24 or head[:8] != b"\x89PNG\r\n\x1a\n":
        raise ValueError(".png: is not PNG")
    return Length(int.from_bytes(head[16:20], "big") * int.from_bytes(head[20:24], "big"))


def webp(file: BinaryIO, member: Member) -> Length:
    head = payload(file, member, 0, 30)
    if len(head) < 30 or head[:4] + head[8:12] != b"RIFFWEBP":
        raise ValueError(".webp: is not WebP")
    if head[12:16] == b"VP8X":  # 24 bits each, less 1
        width, height = (int.from_bytes(head[i : i + 3], "little") + 1 for i in (24, 27))
    elif head[12:16] == b"VP8L":  # 14 bits each, less 1
        packed = int.from_bytes(head[21:25], "little")
        width, height = (packed & 0x3FFF) + 1, (packed >> 14 & 0x3FFF) + 1
    else:
        width, height = (int.from_bytes(head[i : i + 2], "little") & 0x3FFF for i in (26, 28))
    return Length(width * height)


def npy(file: BinaryIO, member: Member) -> Length:
    head = payload(file, member, 0, 12)
    wide = head[6:7] > b"\x01"  # version 2 and 3
    start = 12 if wide else 10
    try:
        if head[:6] != b"\x93NUMPY":
            raise ValueError("is not an array")
        text = payload(file, member, start, int.from_bytes(head[8:start], "little"))
        about = ast.literal_eval(text.decode("latin-1").strip())
        (number,), width = about["shape"], int(about["descr"][2:])
    except (ValueError, SyntaxError, TypeError, KeyError, IndexError, MemoryError) as error:
        raise ValueError(f".npy: cannot be read ({error})") from None
    if start + len(text) + number * width > member.size:
        raise ValueError(".npy: is truncated")
    return Length(number)
