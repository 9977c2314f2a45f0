"""FLAC files whose header does not state all of their frames (RFC 9639).

libsndfile decodes the number of frames in STREAMINFO, of the first of several joined files only.
"""

from __future__ import annotations

from d2v_ds.data.checks import Unusable
from d2v_ds.data.containers import Buffer

MARKERS = (b"fLaC\0\0\0\x22", b"fLaC\x80\0\0\x22")  # followed by other metadata, or by frames
SYNCS = (b"\xff\xf8", b"\xff\xf9")  # of frames with a fixed, and with a variable number of samples
LONGEST_HEADER = 16  # bytes of a frame header
LONGEST_FRAME = 1 << 21  # bytes that are searched for the last frame header; 65,535 samples of 32
# bits in eight channels have as many
JOINED = 1000  # files
SMALLEST_FRAME = 9  # bytes
SAMPLES = {1: 192, **{i: 144 << i for i in range(2, 6)}, **{i: 1 << i for i in range(8, 16)}}
"""Samples of a frame by their code in its header; 6 and 7: the number follows."""


def joined(data: Buffer) -> list[int]:
    """The first byte of each FLAC file in `data`. Raises Unusable if there are too many."""
    found = []
    for marker in MARKERS:
        at = data.rfind(marker)  # several times faster than find
        while at >= 0:
            found.append(at)
            if len(found) > JOINED:
                raise Unusable("damaged", f"consists of more than {JOINED} joined files")
            at = data.rfind(marker, 0, at)
    return sorted(found)


def stated_frames(data: Buffer, start: int) -> int:
    """In the STREAMINFO of the file at a byte; 0 if it does not say."""
    return int.from_bytes(data[start + 21 : start + 26], "big") & (1 << 36) - 1


def check_plausible(data: Buffer, frames: int) -> None:
    """Raises Unusable if a damaged header states more frames than its bytes can hold: memory for
    them would be allocated."""
    largest = int.from_bytes(data[10:12], "big")
    if data[:4] == b"fLaC" and frames > (len(data) // SMALLEST_FRAME + 1) * largest:
        raise Unusable("damaged", f"states {frames:,} frames, more than its bytes can hold")


def with_frames(data: Buffer, start: int, stop: int, frames: int) -> bytes:
    """The file with this number of frames in its header."""
    fields = int.from_bytes(data[start + 18 : start + 26], "big") >> 36 << 36 | frames
    return data[start : start + 18] + fields.to_bytes(8, "big") + data[start + 26 : stop]


def largest_frame(data: Buffer) -> int:
    """Samples of the largest frame, by the STREAMINFO at the beginning."""
    return int.from_bytes(data[10:12], "big")


def last_frame(data: Buffer, start: int, stop: int) -> int:
    """The number of samples up to the end of the last frame, by its header; 0 if there is none.

    Coded samples may look like a header. If a header in the last bytes agrees with STREAMINFO, that
    one is taken.
    """
    largest = int.from_bytes(data[start + 10 : start + 12], "big")  # samples per frame
    stated = stated_frames(data, start)
    limit = min(
        int.from_bytes(data[start + 15 : start + 18], "big") or LONGEST_FRAME, LONGEST_FRAME
    )
    first = max(start + 42, stop - 2 * limit)
    tail = data[first:stop]
    last = 0
    for sync in SYNCS:
        at = tail.rfind(sync)
        while at >= 0:
            ends = _end_of_frame(tail[at : at + LONGEST_HEADER], largest)
            if ends and ends == stated:
                return stated
            last = max(last, ends)
            at = tail.rfind(sync, 0, at + 1)
    return last


def _end_of_frame(head: bytes, largest: int) -> int:
    """The number of the sample after a frame, by its header; 0 if it is not a valid header."""
    if len(head) < 6 or head[3] & 1:
        return 0
    ones = 8 - (head[4] ^ 0xFF).bit_length()  # leading ones of a number coded as in UTF-8
    if ones in (1, 8):
        return 0
    more = max(0, ones - 1)  # bytes
    number = head[4] & 0x7F >> ones
    for byte in head[5 : 5 + more]:
        number = number << 6 | byte & 0x3F
    at = 5 + more
    code, rate = head[2] >> 4, head[2] & 15
    samples = SAMPLES.get(code, 0)
    if code in (6, 7):
        samples = int.from_bytes(head[at : at + code - 5], "big") + 1
        at += code - 5
    at += {12: 1, 13: 2, 14: 2}.get(rate, 0)
    if not samples or rate == 15 or at >= len(head) or _crc8(head[:at]) != head[at]:
        return 0
    return (number if head[1] & 1 else number * largest) + samples


def _crc8(data: bytes) -> int:
    """Polynomial x^8 + x^2 + x + 1."""
    value = 0
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = (value << 1 ^ 0x07 if value & 0x80 else value << 1) & 0xFF
    return value
