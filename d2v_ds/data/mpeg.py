"""The frames of MPEG audio (MP3), whose length no header needs to state.

    bytes -> scan -> MpegAudio(frames that are there, frames that its Xing headers state)
                  -> rebuilt: the same frames behind a header that states their number

Without a Xing header mpg123 (in libsndfile) estimates the length from the first frames; with one,
it stops where the header of the first of several joined files ends. Frame headers as in ISO/IEC
11172-3 and 13818-3; Xing and Info headers as LAME writes them; VBRI as Fraunhofer's encoder does.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

from d2v_ds.data import tags
from d2v_ds.data.checks import Unusable
from d2v_ds.data.containers import Buffer

# kbit/s by (MPEG-1?, layer); index 0 is the free format, 15 is not allowed
_LOW = (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)
BITRATES = {
    (True, 1): tuple(range(0, 449, 32)),
    (True, 2): (0, 32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 1): (0, 32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): _LOW,
    (False, 3): _LOW,
}
RATES = (44_100, 48_000, 32_000)  # of MPEG-1; half of it in MPEG-2, a quarter in MPEG-2.5
XING = (b"Xing", b"Info")  # names of a Xing header, which is a frame without audio
SIDE = {(True, 2): 32, (True, 1): 17, (False, 2): 17, (False, 1): 9}
"""Bytes between the header of a frame and a Xing header, by (MPEG-1?, channels)."""
VBRI_PLACE = 36  # in a frame, of the header of Fraunhofer's encoder
JUNK = 4096  # bytes between frames that may be anything, as players allow
SYNC = re.compile(rb"\xff[\xe2-\xff]")
CHAIN = 4  # adjacent frames that other bytes do not form by chance


class Frame(NamedTuple):
    """What a frame header states."""

    size: int  # bytes, with the header
    kind: tuple[int, int, int]  # layer, frames per second of the audio, channels
    samples: int  # frames of audio that it decodes to
    xing: int = 0  # place of a Xing header, if it has one


@dataclass
class MpegAudio:
    """The audio frames of a file, without tags and Xing headers."""

    kind: tuple[int, int, int] = (0, 0, 0)  # as in Frame
    samples: int = 0  # of each frame
    spans: list[tuple[int, int]] = field(default_factory=list)  # bytes of adjacent frames
    frames: int = 0
    stated: list[int] = field(default_factory=list)  # numbers of frames in its Xing headers
    header: tuple[int, int] = (0, 0)  # bytes of the frame with the first Xing header
    cut: bool = False  # ends within a frame
    junk: int = 0  # bytes between frames that are neither tags nor zeros
    rest: int = 0  # such bytes behind the last frame

    @property
    def complete(self) -> bool:
        """Whether one header states the number of frames that are there."""
        return self.stated == [self.frames]

    @property
    def exact(self) -> bool:
        """Whether libsndfile reads all of it: what follows the last frame does not matter."""
        return self.complete and not self.junk

    def seconds(self, frames: int) -> float:
        return frames * self.samples / self.kind[1]


@lru_cache(maxsize=1024)
def frame_of(head: bytes) -> Frame | None:
    """The frame that begins with these four bytes; None if they are no frame header."""
    if len(head) < 4 or head[0] != 0xFF or head[1] < 0xE0:
        return None
    version, layer = head[1] >> 3 & 3, 4 - (head[1] >> 1 & 3)
    bitrate, rate = head[2] >> 4, head[2] >> 2 & 3
    if version == 1 or layer == 4 or bitrate in (0, 15) or rate == 3:
        return None
    mpeg1 = version == 3
    bits = BITRATES[mpeg1, layer][bitrate] * 1000
    hertz = RATES[rate] >> {3: 0, 2: 1, 0: 2}[version]
    padding = head[2] >> 1 & 1
    kind = layer, hertz, 1 if head[3] >> 6 == 3 else 2
    if layer == 1:
        return Frame((12 * bits // hertz + padding) * 4, kind, 384)
    samples = 1152 if mpeg1 or layer == 2 else 576
    xing = 4 + SIDE[mpeg1, kind[2]] + 2 * (not head[1] & 1) if layer == 3 else 0  # 2: a checksum
    return Frame(samples // 8 * bits // hertz + padding, kind, samples, xing)


def first(data: Buffer) -> int:
    """The first byte of the first frames that follow each other; -1 if there are none."""
    for match in SYNC.finditer(data):
        at, kind = match.start(), None
        for _ in range(CHAIN):
            frame = frame_of(data[at : at + 4])
            if not frame or (kind and frame.kind != kind):
                break
            at, kind = at + frame.size, frame.kind
        else:
            return match.start()
    return -1


def scan(data: Buffer) -> MpegAudio:
    """Finds every frame. Raises Unusable if later frames have another sample rate or number of
    channels, as in joined files."""
    found = MpegAudio()
    at = stop = start = frames = 0  # of the next frame, of the last one, of the span
    kind, size = found.kind, tags.end(data)
    while at < size:
        frame = frame_of(data[at : at + 4])
        if not frame or (
            (frame.kind != kind or at != stop) and not _is_followed(data, at, frame, size)
        ):
            after = min(_next_frame(data, at), size)
            if frames and not _is_tag(data, at):
                found.rest += len(data[at:after].strip(b"\0"))
            at = after
            continue
        if frame.kind != kind:
            if found.samples:
                raise Unusable("format", f"{_change(kind, frame.kind)}, as in joined files")
            found.kind = kind = frame.kind
            found.samples = frame.samples
        after = at + frame.size
        if after > size:
            found.cut = True
            break
        found.junk, found.rest = found.junk + found.rest, 0
        is_header = data[at + frame.xing : at + frame.xing + 4] in XING or (
            not frames and data[at + VBRI_PLACE : at + VBRI_PLACE + 4] == b"VBRI"
        )
        if is_header:
            found.stated.append(_stated(data, at, frame))
            found.header = found.header if found.header[1] else (at, after)
        if is_header or at != stop:
            if stop > start:
                found.spans.append((start, stop))
            start = after if is_header else at
        frames += not is_header
        at = stop = after
    if stop > start:
        found.spans.append((start, stop))
    found.frames = frames
    return found


def _stated(data: Buffer, at: int, frame: Frame) -> int:
    """The number of frames that the header in the frame at a byte states; 0 if it does not say."""
    place = at + frame.xing
    if data[place : place + 4] not in XING:
        place = at + VBRI_PLACE + 6
    elif not data[place + 7] & 1:
        return 0
    return int.from_bytes(data[place + 8 : place + 12], "big")


def rebuilt(data: Buffer, found: MpegAudio) -> bytes:
    """The audio frames behind a Xing header with their number: the file's own, which also states
    the padding, if its number is right. A Xing header exists in layer III only; the other layers
    have a constant bitrate, so their length need not be estimated."""
    frames = [data[first:stop] for first, stop in found.spans]
    if found.complete:
        return b"".join([data[slice(*found.header)], *frames])
    if found.kind[0] != 3:
        return b"".join(frames)
    head = bytearray(frames[0][:4])
    head[1] |= 1  # no checksum
    for bitrate in range(1, 15):
        head[2] = bitrate << 4 | head[2] & 0x0C
        frame = frame_of(bytes(head))
        if frame and frame.size >= frame.xing + 12:
            break
    assert frame
    xing = bytes(frame.xing - 4) + b"Xing" + struct.pack(">II", 1, found.frames)
    return b"".join([bytes(head), xing.ljust(frame.size - 4, b"\0"), *frames])


def _change(old: tuple[int, int, int], new: tuple[int, int, int]) -> str:
    was, now = (f"layer {a}, {b} Hz, {c} channel{'s' * (c > 1)}" for a, b, c in (old, new))
    return f"changes from {was} to {now}"


def _is_followed(data: Buffer, at: int, frame: Frame, size: int) -> bool:
    """Whether another frame of its kind, a tag or the end of the audio follows."""
    after = at + frame.size
    following = frame_of(data[after : after + 4])
    if following:
        return following.kind == frame.kind
    return after == size or _is_tag(data, after)


def _is_tag(data: Buffer, at: int) -> bool:
    return data[at : at + 3] in (b"TAG", b"ID3") or data[at : at + 6] in (b"APETAG", b"LYRICS")


def _next_frame(data: Buffer, at: int) -> int:
    """Where the next frame may begin: behind the tag at a byte, or at the next byte of a sync."""
    if (after := tags.behind(data, at)) > at:
        return after
    found = data.find(b"\xff", at + 1)
    marks = [i for tag in (b"TAG", b"ID3", tags.APE) if (i := data.find(tag, at + 1, found)) >= 0]
    return min([len(data) if found < 0 else found, *marks])
