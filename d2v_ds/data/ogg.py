"""Whether an Ogg file (Vorbis, Opus) is intact: libsndfile silently decodes damaged and truncated
ones. Pages as in RFC 3533 (https://www.rfc-editor.org/rfc/rfc3533)."""

from __future__ import annotations

import zlib

HEADER = 27  # bytes of a page before its segment table
START_OF_STREAM, END_OF_STREAM = 2, 4  # bits of the header type
REVERSED = bytes(
    int(f"{byte:08b}"[::-1], 2) for byte in range(256)
)  # each byte with its bits reversed


def ogg_problem(data: bytes) -> str:
    """The damage; "" if the checksums of all pages are correct, no page is missing, and the last
    page ends the stream."""
    at, page, last = 0, 0, 0
    while at < len(data):
        head = data[at : at + HEADER]
        if len(head) < HEADER or head[:4] != b"OggS":
            return f"is truncated or damaged: no Ogg page at byte {at}"
        table = data[at + HEADER : at + HEADER + head[26]]
        size = HEADER + head[26] + sum(table)
        if len(table) < head[26] or at + size > len(data):
            return f"is truncated: its Ogg page at byte {at} has {len(data) - at} of {size} bytes"
        sequence, checksum = (int.from_bytes(head[i : i + 4], "little") for i in (18, 22))
        if checksum != _checksum(data[at : at + size]):
            return f"is damaged: the checksum of its Ogg page at byte {at} is wrong"
        if head[5] & START_OF_STREAM:  # streams may follow each other
            if at and not last & END_OF_STREAM:
                return f"is damaged: the Ogg stream before byte {at} does not end"
            page = sequence
        if sequence != page:
            return f"is damaged: Ogg page {page} is missing before byte {at}"
        page, last, at = page + 1, head[5], at + size
    return "" if last & END_OF_STREAM else "is truncated: its last Ogg page does not end the stream"


def _checksum(page: bytes) -> int:
    """Ogg's CRC-32 (highest bit first, no inversions), computed with zlib's."""
    blank = page[:22] + bytes(4) + page[26:]
    mirrored = zlib.crc32(blank.translate(REVERSED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int(f"{mirrored:032b}"[::-1], 2)
