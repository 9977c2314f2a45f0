"""Whether an Ogg file (Vorbis, Opus) is intact: libsndfile silently decodes damaged and truncated
ones. Pages as in RFC 3533 (https://www.rfc-editor.org/rfc/rfc3533)."""

from __future__ import annotations

import zlib

from d2v_ds.data import tags
from d2v_ds.data.checks import Unusable
from d2v_ds.data.containers import Buffer

HEADER = 27  # bytes of a page before its segment table
START_OF_STREAM, END_OF_STREAM = 2, 4  # bits of the header type
REVERSED = bytes(
    int(f"{byte:08b}"[::-1], 2) for byte in range(256)
)  # each byte with its bits reversed


def streams(data: Buffer) -> tuple[list[tuple[int, int]], int]:
    """([(first byte, end) of each stream], number of bytes behind the last one that are neither
    tags nor zeros). Streams may follow each other; libsndfile decodes the first one only. Raises
    Unusable unless the checksums of all pages are correct, no page is missing, and each stream
    ends."""
    found: list[int] = []
    at, page, last = 0, 0, END_OF_STREAM
    while at < len(data):
        head = data[at : at + HEADER]
        if head[:4] != b"OggS" and found and last & END_OF_STREAM and data.find(b"OggS", at) < 0:
            break
        if len(head) < HEADER or head[:4] != b"OggS":
            raise Unusable("truncated", f"is truncated or damaged: no Ogg page at byte {at}")
        table = data[at + HEADER : at + HEADER + head[26]]
        size = HEADER + head[26] + sum(table)
        if len(table) < head[26] or at + size > len(data):
            raise Unusable(
                "truncated",
                f"is truncated: its Ogg page at byte {at} has {len(data) - at} of {size} bytes",
            )
        sequence, checksum = (int.from_bytes(head[i : i + 4], "little") for i in (18, 22))
        if checksum != _checksum(data[at : at + size]):
            raise Unusable(
                "damaged", f"is damaged: the checksum of its Ogg page at byte {at} is wrong"
            )
        if head[5] & START_OF_STREAM:
            if not last & END_OF_STREAM:
                raise _unended(at, last)
            found.append(at)
            page = sequence
        if sequence != page:
            raise Unusable("damaged", f"is damaged: Ogg page {page} is missing before byte {at}")
        page, last, at = page + 1, head[5], at + size
    if not found or not last & END_OF_STREAM:
        raise Unusable("truncated", "is truncated: its last Ogg page does not end the stream")
    rest = len(data[at : tags.end(data)].strip(b"\0"))
    return list(zip(found, [*found[1:], at], strict=True)), rest


def _unended(at: int, last: int) -> Unusable:
    """The error for a stream that begins at a byte, after a page with the bits `last`."""
    if last & START_OF_STREAM:
        return Unusable("format", "holds several streams at once, such as audio and video")
    return Unusable("damaged", f"is damaged: the Ogg stream before byte {at} does not end")


def _checksum(page: bytes) -> int:
    """Ogg's CRC-32 (highest bit first, no inversions), computed with zlib's."""
    blank = page[:22] + bytes(4) + page[26:]
    mirrored = zlib.crc32(blank.translate(REVERSED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int(f"{mirrored:032b}"[::-1], 2)
