"""Lengths of samples from the headers of their files; nothing is decoded.

    member of a tar --HeaderReader--> Length (frames, pixels or tokens; sample rate of audio)

WAV (RIFF), FLAC (RFC 9639, section 8.2), JPEG (T.81, B.2.2), PNG (section 11.2.2 of its
specification), WebP (RFC 9649), .npy (numpy.lib.format). Every reader raises Unusable, a
ValueError, with the reason. Standard library only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import BinaryIO, NamedTuple

from d2v_ds.data.checks import Unusable
from d2v_ds.data.containers import extent_of
from d2v_ds.data.npy import header as npy_header
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


def image_type(head: bytes) -> str:
    """The extension of an image file by its first 16 bytes; "" if they are of no known format."""
    if head[:3] == b"\xff\xd8\xff":
        return "jpg"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "webp"
    if head[4:8] == b"ftyp" and head[8:12] in (b"avif", b"avis"):
        return "avif"
    if head[:2] == b"BM" and head[6:10] == bytes(4):
        return "bmp"
    for start, name in (
        (b"\x89PNG\r\n\x1a\n", "png"),
        (b"GIF87a", "gif"),
        (b"GIF89a", "gif"),
        (b"II*\0", "tif"),
        (b"MM\0*", "tif"),
        (b"\0\0\0\x0cjP  \r\n\x87\n", "jp2"),
    ):
        if head.startswith(start):
            return name
    return ""


def jpeg(file: BinaryIO, member: Member) -> Length:
    return _picture(file, member, ".jpg")


def png(file: BinaryIO, member: Member) -> Length:
    return _picture(file, member, ".png")


def webp(file: BinaryIO, member: Member) -> Length:
    return _picture(file, member, ".webp")


def _picture(file: BinaryIO, member: Member, extension: str) -> Length:
    """Of JPEG, PNG or WebP, whatever the extension says, because decoding does not depend on it
    either."""
    head = payload(file, member, 0, 30)
    if not head:
        raise Unusable("empty", f"{extension}: is empty")
    for start, reader in ((b"\xff\xd8", _jpeg), (b"\x89PNG\r\n\x1a\n", _png), (b"RIFF", _webp)):
        if head.startswith(start):
            try:
                return reader(file, member, head)
            except Unusable as error:
                raise Unusable(error.kind, f"{extension}: {error}") from None
    raise Unusable("format", f"{extension}: is neither JPEG, PNG nor WebP")


def _jpeg(file: BinaryIO, member: Member, _: bytes) -> Length:
    at = 2
    while len(head := payload(file, member, at, 9)) == 9 and head[0] == 0xFF:
        marker = head[1]
        if marker == 0xFF:  # padding
            at += 1
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # start of frame
            return Length(int.from_bytes(head[5:7], "big") * int.from_bytes(head[7:9], "big"))
        else:
            at += 2 + (0 if 0xD0 <= marker <= 0xD8 else int.from_bytes(head[2:4], "big"))
    raise Unusable("damaged", "has no frame header")


def _png(file: BinaryIO, member: Member, head: bytes) -> Length:
    if len(head) < 24:
        raise Unusable("truncated", "ends within its header")
    return Length(int.from_bytes(head[16:20], "big") * int.from_bytes(head[20:24], "big"))


def _webp(file: BinaryIO, member: Member, head: bytes) -> Length:
    if len(head) < 30 or head[8:12] != b"WEBP":
        raise Unusable("format", "is not WebP")
    if head[12:16] == b"VP8X":  # 24 bits each, less 1
        width, height = (int.from_bytes(head[i : i + 3], "little") + 1 for i in (24, 27))
    elif head[12:16] == b"VP8L":  # 14 bits each, less 1
        packed = int.from_bytes(head[21:25], "little")
        width, height = (packed & 0x3FFF) + 1, (packed >> 14 & 0x3FFF) + 1
    else:
        width, height = (int.from_bytes(head[i : i + 2], "little") & 0x3FFF for i in (26, 28))
    return Length(width * height)


def npy(file: BinaryIO, member: Member) -> Length:
    try:
        found = npy_header(lambda at, number: payload(file, member, at, number), member.size)
    except Unusable as error:
        raise Unusable(error.kind, f".npy: {error}") from None
    return Length(found.shape[0])
