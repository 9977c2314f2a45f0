"""Tags of music players before and behind audio: ID3, APEv2 and Lyrics3, in files of any format.

ID3v2 as in https://id3.org/id3v2.4.0-structure, APEv2 and Lyrics3 as in
https://wiki.hydrogenaud.io/index.php?title=APEv2_specification and https://id3.org/Lyrics3v2.
"""

from __future__ import annotations

import re

from d2v_ds.data.containers import Buffer

ZEROS = re.compile(rb"\0{16,}")  # fewer may belong to a header, such as that of MP4
APE, APE_SIZE = b"APETAGEX", 32  # of its header, and of its footer
LONGEST_LYRICS = 5200  # bytes of Lyrics3v1, which does not state its size


def front(data: Buffer) -> int:
    """The first byte behind the tags and zeros that a file begins with."""
    at = 0
    while at < len(data):
        match = ZEROS.match(data, at)
        after = match.end() if match else behind(data, at)
        if after == at:
            break
        at = after
    return min(at, len(data))


def behind(data: Buffer, at: int) -> int:
    """The end, perhaps behind that of the file, of the tag that begins at a byte; `at` if there is
    none."""
    head = data[at : at + APE_SIZE]
    if head[:3] == b"TAG":
        return at + 128
    if head[:3] == b"ID3" and len(head) >= 10:
        return at + 10 + _synchsafe(head[6:10]) + 10 * (head[5] >> 4 & 1)  # a footer
    if head[:8] == APE and len(head) == APE_SIZE:
        is_header = head[23] & 0x20
        return at + APE_SIZE + int.from_bytes(head[12:16], "little") * bool(is_header)
    return at


def end(data: Buffer) -> int:
    """Where the tags at the end of a file begin; its length if there are none."""
    stop = len(data)
    while (before := _before(data, stop)) < stop:
        stop = before
    return stop


def _before(data: Buffer, stop: int) -> int:
    """The first byte of the tag that ends before `stop`; `stop` if there is none."""
    first = stop
    if data[max(0, stop - 128) : stop][:3] == b"TAG":
        first = stop - 128
        if data[max(0, first - 227) : first][:4] == b"TAG+":
            first -= 227
        return first
    foot = data[max(0, stop - APE_SIZE) : stop]
    if foot[:8] == APE:
        has_header = foot[23] & 0x80
        first = stop - int.from_bytes(foot[12:16], "little") - APE_SIZE * bool(has_header)
    elif foot[-9:] == b"LYRICS200" and foot[-15:-9].isdigit():
        first = stop - 15 - int(foot[-15:-9])
    elif foot[-9:] == b"LYRICSEND":
        first = data.rfind(b"LYRICSBEGIN", max(0, stop - LONGEST_LYRICS), stop)
    elif foot[-10:-7] == b"3DI":
        first = stop - 20 - _synchsafe(foot[-4:])
    return first if 0 <= first < stop else stop


def _synchsafe(size: bytes) -> int:
    """A number of four bytes with seven bits each."""
    return sum(byte << shift for byte, shift in zip(size, (21, 14, 7, 0), strict=True))
