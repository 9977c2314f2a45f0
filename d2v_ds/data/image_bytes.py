"""What Pillow does not tell about image files: checksums, missing ends, depth, and other formats.

Reads the bytes of a file without decoding pixels. Formats: PNG (ISO/IEC 15948), JPEG (ITU-T T.81),
JPEG 2000 (ITU-T T.800), QOI (qoiformat.org), AVIF (AV1 Image File Format 1.1), HEIF (ISO/IEC
23008-12).
"""

from __future__ import annotations

import zlib

from d2v_ds.data.checks import Unusable

OTHERS = (  # (first bytes, what the file is)
    (b"<svg", "SVG"),
    (b"<!doctype html", "HTML, such as the page of an error"),
    (b"<html", "HTML, such as the page of an error"),
    (b"<?xml", "XML"),
    (b"%pdf", "PDF"),
    (b"%!ps", "PostScript"),
    (b"\xc5\xd0\xd3\xc6", "PostScript"),
    (b"8bps", "a Photoshop document"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\0\0\0\x0cjxl ", "JPEG XL"),
    (b"\x1f\x8b", "compressed with gzip"),
    (b"pk\x03\x04", "a ZIP archive"),
    (b"version https://git-lfs", "a pointer of Git LFS; fetch the file with `git lfs pull`"),
)
ENDS = {  # format: (mark at the start, mark at the end), which the data between them cannot contain
    "JPEG2000": (b"\xff\x4f\xff\x51", b"\xff\xd9"),
    "QOI": (b"qoif", bytes(7) + b"\1"),
}
HEIF = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")  # brands


def other_type(data: bytes) -> str:
    """What a file is that is no image that can be read; "" if that is unknown."""
    head = data[:256].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if data[4:8] == b"ftyp" and data[8:12] in HEIF:
        return "HEIC; convert it to JPEG first, for example with `heif-convert FILE FILE.jpg`"
    return next((name for start, name in OTHERS if head.startswith(start)), "")


def check_end(kind: str, data: bytes) -> None:
    """Raises Unusable for damage that decoding does not show: a JPEG, JPEG 2000 or QOI file without
    its end mark, whose last part can be zeros, and a PNG whose pixels have a wrong checksum."""
    if kind in ("JPEG", "MPO"):
        _check_jpeg(data)
    elif kind == "PNG":
        _check_png(data)
    elif mark := ENDS.get(kind):
        start, end = mark
        if data.rfind(end, max(0, data.find(start))) < 0:
            raise _without_end()


def _check_jpeg(data: bytes) -> None:
    at = 2
    while data[at : at + 1] == b"\xff" and (marker := data[at + 1 : at + 2]) != b"\xda":
        at += 1 if marker == b"\xff" else 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    # Within the data of the picture, a byte 0xFF is followed by 0 or a restart mark.
    if data[at : at + 2] == b"\xff\xda" and data.rfind(b"\xff\xd9", at) < 0:
        raise _without_end()


def _without_end() -> Unusable:
    return Unusable("truncated", "lacks its end mark, so a part of the picture is missing")


def _check_png(data: bytes) -> None:
    view, at = memoryview(data), 8
    while at + 12 <= len(data):
        size, name = int.from_bytes(view[at : at + 4], "big"), data[at + 4 : at + 8]
        end = at + 8 + size
        if name == b"IDAT" and end + 4 > len(data):
            raise Unusable("truncated", "ends within its pixels")
        if name == b"IEND":
            return
        if name == b"IDAT" and zlib.crc32(view[at + 4 : end]) != int.from_bytes(
            view[end : end + 4], "big"
        ):
            raise Unusable("damaged", "the checksum of its pixels is wrong")
        at = end + 4


def coded_bits(kind: str, data: bytes) -> int:
    """Bits per channel of a JPEG 2000 or AVIF file, which Pillow decodes to 8; 0 if unknown."""
    if kind == "AVIF":
        at = data.find(b"av1C")  # box: version, profile, then tier, high_bitdepth, twelve_bit
        if at < 0 or at + 7 > len(data):
            return 0
        high, twelve = data[at + 6] & 0x40, data[at + 6] & 0x20
        return (12 if twelve else 10) if high else 8
    if kind == "JPEG2000":
        at = data.find(b"\xff\x4f\xff\x51")  # SOC, SIZ: the depth follows 38 bytes
        return (data[at + 42] & 0x7F) + 1 if 0 <= at < len(data) - 42 else 0
    return 0
