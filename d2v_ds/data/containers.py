"""Where the samples of an uncompressed audio file are, according to its header.

    header -> Extent(first byte, bytes that the header states, bytes that nothing explains)

libsndfile silently reads what is left of a truncated file, and stops silently where a header states
too little. WAV (RIFF, RIFX, RF64 of EBU Tech 3306), W64, AIFF and AIFF-C, 8SVX, AU, CAF, NIST
SPHERE, VOC and SDS. Standard library only: the index of a tar uses it too.
"""

from __future__ import annotations

import mmap
import string
import struct
from collections.abc import Callable, Iterator
from typing import NamedTuple

from d2v_ds.data.checks import Unusable

Buffer = bytes | mmap.mmap
Peek = Callable[[int, int], bytes]  # (first byte, number) -> bytes, fewer at the end of the file

FFMPEG = "convert it first: ffmpeg -i FILE FILE.flac"  # what to do about other formats
# Streaming writers do not know the length. They store 0, or a value near 2^31 or 2^32 (ffmpeg
# 0xFFFFFFFF, SoX 0x7FFFF000, arecord 0x80000000, others less the size of the header).
# Chunks of later files, or with more samples, are not metadata.
NOT_METADATA = (b"RIFF", b"RIFX", b"RF64", b"BW64", b"FORM", b"data", b"SSND", b"BODY")
# Metadata is accepted even if the file ends within it: the samples are complete.
METADATA = (
    b"LIST",
    b"id3 ",
    b"ID3 ",
    b"bext",
    b"iXML",
    b"axml",
    b"fact",
    b"cue ",
    b"PEAK",
    b"smpl",
)
AIFF_METADATA = (b"NAME", b"AUTH", b"(c) ", b"ANNO", b"COMT", b"MARK", b"INST", b"APPL", b"ID3 ")
FOLLOWING = (b"fmt ", b"data", *METADATA)
INNER = {b"LIST": (b"INFO", b"adtl"), b"id3 ": (b"ID3",), b"ID3 ": (b"ID3",)}  # first in a chunk
LONGEST_METADATA = 1 << 24  # bytes at the end of a file that are searched for chunks
PCM, FLOAT, ALAW, ULAW, EXTENSIBLE = (
    1,
    3,
    6,
    7,
    0xFFFE,
)  # codings of a WAV; the last states it later
SDS_HEADER = 21  # bytes
CHUNKS = 10_000  # of a file; some recorders write one of metadata for every mark
CHAINS = 100  # places that are examined for metadata at the end of a file
PRINTABLE = frozenset(string.printable.encode())
W64_NAME = bytes.fromhex("f3acd3118cd100c04f8edb8a")  # the last 12 bytes of its chunk names
ZEROS = 1 << 16  # bytes that are compared at a time


class Chunks(NamedTuple):
    """How a container writes the header of a chunk."""

    form: str  # of struct: name and size
    align: int  # chunks begin at multiples of this
    inclusive: bool = False  # the size includes the header


RIFF, RIFX = Chunks("<4sI", 2), Chunks(">4sI", 2)
CAF, W64 = Chunks(">4sq", 1), Chunks("<16sQ", 8, inclusive=True)


class Extent(NamedTuple):
    first: int  # byte of the first sample
    size: int  # bytes of samples
    rest: int = 0  # bytes behind the samples that are neither metadata nor padding
    rate: int = 0  # frames per second and bytes per frame, of WAV
    frame: int = 0
    frames: int = 0  # that another chunk states, of AIFF and CAF
    stated: bool = True  # whether the header states the size
    patch: tuple[int, bytes] | None = None  # (place, bytes) of the size that the header lacks


def extent_of(peek: Peek, total: int) -> Extent | None:
    """The extent of a file of `total` bytes; None for other containers. Raises Unusable if the
    samples end before the size in the header."""
    head = peek(0, 40)
    if head[:4] in (b"RIFF", b"RIFX", b"RF64", b"BW64") and head[8:12] == b"WAVE":
        return _riff(peek, total, head)
    if head[:4] == b"riff" and head[4:16].hex().startswith("2e91cf11a5d628db04c10000"):
        return _chunked(peek, total, W64, 40, b"data")
    if head[:4] == b"FORM" and head[8:12] in (b"AIFF", b"AIFC", b"8SVX", b"16SV"):
        if head[8:9] != b"A":
            return _chunked(peek, total, RIFX, 12, b"BODY")
        extent = _chunked(peek, total, RIFX, 12, b"SSND")
        return extent and extent._replace(frames=_aiff_frames(peek))
    if head[:4] == b"caff":
        extent = _chunked(peek, total, CAF, 8, b"data")
        return extent and extent._replace(frames=_frames_of_packets(peek))
    if head[:4] in (b".snd", b"dns.") and len(head) >= 12:
        first, size = struct.unpack(">II" if head[:1] == b"." else "<II", head[4:12])
        _within(first, total)
        if _is_placeholder(size):
            left = min(total - first, 0xFFFF_FFFF)
            size_bytes = struct.pack(">I" if head[:1] == b"." else "<I", left)
            # libsndfile reads 0xFFFFFFFF as "to the end", but not other placeholders.
            patch = None if size == 0xFFFF_FFFF else (8, size_bytes)
            return Extent(first, total - first, stated=False, patch=patch)
        return _whole(peek, total, first, size)
    if head[:8] == b"NIST_1A\n":
        return _nist(peek, total)
    if head[:20] == b"Creative Voice File\x1a":
        return _voc(peek, total, int.from_bytes(head[20:22], "little"))
    if head[:2] == b"\xf0\x7e" and head[3:4] == b"\1":
        return _sds(peek, total, head)
    return None


def _chunks(peek: Peek, chunks: Chunks, at: int) -> Iterator[tuple[bytes, int, int]]:
    """(name, first byte of the content, its size) of each chunk."""
    length = struct.calcsize(chunks.form)
    for _ in range(CHUNKS):
        if len(head := peek(at, length)) < length:
            return
        name, size = struct.unpack(chunks.form, head)
        size -= length * chunks.inclusive
        yield name, at + length, size
        if size < 0:
            return
        at += length + size
        at += -at % chunks.align
    raise Unusable("damaged", f"has more than {CHUNKS:,} chunks")


def _riff(peek: Peek, total: int, head: bytes) -> Extent | None:
    chunks = RIFX if head[:4] == b"RIFX" else RIFF
    rate = frame = sizes = 0
    for name, at, size in _chunks(peek, chunks, 12):
        if name == b"data":
            break
        if size % 2:
            _check_padded(peek, name, at + size)
        _within(at + size, total)
        if name == b"ds64":
            sizes = at  # of the file, of the samples, of the frames: 64 bits each
        if name == b"fmt " and len(found := peek(at, 16)) >= 14:
            rate, frame = struct.unpack(chunks.form[0] + "4xI4xH", found[:14])
            _check_format(found, chunks.form[0])
    else:
        return None
    place, form, known = at - 4, chunks.form[0] + "I", not _is_placeholder(size)
    if sizes and size == 0xFFFF_FFFF:
        size = int.from_bytes(peek(sizes + 8, 8), "little")
        place, form, known = sizes, "<QQQ", 0 < size < 1 << 63
    if known or at + size <= total:
        extent = _whole(peek, total, at, size, chunks)._replace(rate=rate, frame=frame)
        if size or not extent.rest:  # a size of 0 is that of an empty file, unless bytes follow
            return extent
    end = _end_of_samples(peek, total, at, chunks)
    left = end - at
    patch = None  # libsndfile reads an implausible size as "to the end", but not one of 0
    if form == "<QQQ":
        patch = place, struct.pack(form, total - 8, left, 0)
    elif not size or end < total:
        patch = place, struct.pack(form, left)
    return Extent(at, left, 0, rate, frame, stated=False, patch=patch)


def wav_coding(peek: Peek) -> tuple[int, int]:
    """(code of the format, bits of a sample) of a WAV; zeros if it does not say."""
    head = peek(0, 12)
    if head[:4] not in (b"RIFF", b"RIFX", b"RF64", b"BW64") or head[8:] != b"WAVE":
        return 0, 0
    chunks = RIFX if head[:4] == b"RIFX" else RIFF
    for name, at, size in _chunks(peek, chunks, 12):
        if name == b"fmt " and len(found := peek(at, min(size, 26))) >= 16:
            coding, bits = struct.unpack(chunks.form[0] + "H12xH", found[:16])
            if coding == EXTENSIBLE and len(found) == 26:
                [coding] = struct.unpack(chunks.form[0] + "H", found[24:])
            return coding, bits
    return 0, 0


def _within(end: int, total: int) -> None:
    if end > total:
        raise Unusable("truncated", "is truncated: it ends within its header")


def _check_format(found: bytes, order: str) -> None:
    """Raises Unusable if a damaged chunk fmt contradicts itself, of PCM and floats. Some writers
    store a wrong number of bytes per frame or per second, but not both."""
    if len(found) < 16:
        return
    coding, channels, rate, second, frame, bits = struct.unpack(order + "HHIIHH", found)
    width = channels * (1 if coding in (ALAW, ULAW) else -(-bits // 8))
    if coding in (PCM, FLOAT, ALAW, ULAW, EXTENSIBLE) and frame != width and second != rate * width:
        raise Unusable(
            "damaged",
            f"contradicts itself: {channels} channels of {bits} bits, but {frame} bytes per frame",
        )


def _check_padded(peek: Peek, name: bytes, end: int) -> None:
    """Raises Unusable if a chunk of odd size lacks the byte that pads it, which readers need."""
    without, padded = peek(end, 4), peek(end + 1, 4)
    if without in FOLLOWING and padded not in FOLLOWING:
        label = name.decode("latin-1").strip()
        raise Unusable(
            "format", f"has a chunk {label} of odd size without the byte that pads it; {FFMPEG}"
        )


def _is_placeholder(size: int) -> bool:
    return size == 0 or 0x7FFF_0000 <= size <= 0x8000_0000 or size >= 0xFFFF_0000


def _chunked(peek: Peek, total: int, chunks: Chunks, at: int, samples: bytes) -> Extent | None:
    for name, first, size in _chunks(peek, chunks, at):
        if name[:4] == samples:
            if size < 0 or (chunks.form[1:] == "4sI" and _is_placeholder(size)):
                if chunks is CAF:  # nothing may follow samples without a size
                    left = total - first
                    patch = first - 8, struct.pack(">q", left)
                else:
                    left = _end_of_samples(peek, total, first, chunks) - first
                    patch = first - 4, struct.pack(">I", left)
                return Extent(first, left, stated=False, patch=patch)
            return _whole(peek, total, first, size, chunks)
        if chunks is W64 and name[:4] == b"fmt ":
            _check_format(peek(first, 16), "<")
        _within(first + size, total)
    return None


def _frames_of_packets(peek: Peek) -> int:
    """Frames of a CAF with packets of different sizes, by the table of them; 0 for others. Raises
    Unusable if it lacks the table: then libsndfile decodes as many as it finds."""
    found = {name: at for name, at, _ in _chunks(peek, CAF, 8)}
    if b"desc" not in found or len(desc := peek(found[b"desc"], 20)) < 20:
        return 0
    if desc[16:] != bytes(4) or b"data" not in found:
        return 0
    if b"pakt" not in found:
        raise Unusable("damaged", "lacks the table of its packets, or ends before it")
    return int.from_bytes(peek(found[b"pakt"] + 8, 8), "big")


def _aiff_frames(peek: Peek) -> int:
    """In the chunk COMM, which may follow the samples; 0 if there is none."""
    at = next((at for name, at, _ in _chunks(peek, RIFX, 12) if name == b"COMM"), 0)
    return int.from_bytes(peek(at + 2, 4), "big") if at else 0


def _whole(peek: Peek, total: int, first: int, size: int, chunks: Chunks | None = None) -> Extent:
    """chunks: how chunks are written that may follow. Raises Unusable if the file is truncated."""
    if first + size > total:
        raise Unusable(
            "truncated",
            f"is truncated: its header states {size} bytes of samples, but "
            f"{max(0, total - first)} are left",
        )
    return Extent(first, size, _unexplained(peek, total, first + size, chunks))


def _nist(peek: Peek, total: int) -> Extent | None:
    """SPHERE: lines `name -type value` in a header of a size that its second line states."""
    try:
        first = int(peek(8, 8)) if peek(8, 8).strip().isdigit() else 0
        if first % 1024 or b"end_head" not in peek(0, first):
            raise Unusable("damaged", "has a header that does not end where it states")
        rows = (line.split(maxsplit=2) for line in peek(0, first).decode("latin-1").split("\n"))
        fields = {row[0]: row[2] for row in rows if len(row) == 3}
        if "," in fields.get("sample_coding", ""):  # pcm,embedded-shorten-v2.00
            raise Unusable(
                "format", f"is compressed ({fields['sample_coding']}), which cannot be read"
            )
        names = ("sample_count", "sample_n_bytes", "channel_count")
        count, width, channels = (int(fields[name]) for name in names)
    except (KeyError, ValueError) as error:
        if isinstance(error, Unusable):
            raise
        return None
    return _whole(peek, total, first, count * width * channels)


def _voc(peek: Peek, total: int, at: int) -> Extent | None:
    """Creative Voice: blocks of a type (1 byte) and a size (3 bytes); 0 ends the file."""
    prefixes = {1: 2, 9: 12}  # bytes before the samples of a block
    found: Extent | None = None
    while len(head := peek(at, 4)) == 4 and head[0] in range(1, 10):
        size = int.from_bytes(head[1:], "little")
        if head[0] in (1, 2, 9) and found:
            raise Unusable("format", "has several blocks of samples, of which one can be read")
        if head[0] in prefixes:
            prefix = prefixes[head[0]]
            found = _whole(lambda _, __: b"", total, at + 4 + prefix, size - prefix)
        at += 4 + size
    end = at + (peek(at, 1) == b"\0")
    return found and found._replace(rest=_unexplained(peek, total, end, None))


def _sds(peek: Peek, total: int, head: bytes) -> Extent:
    """MIDI Sample Dump Standard: blocks of 127 bytes, of which 120 hold samples, 7 bits each."""
    _within(SDS_HEADER, total)
    width = -(-head[6] // 7) or 1  # bytes of a sample
    frames = head[10] | head[11] << 7 | head[12] << 14
    return _whole(peek, total, SDS_HEADER, -(-frames * width // 120) * 127)


def _unexplained(peek: Peek, total: int, at: int, chunks: Chunks | None) -> int:
    """The number of bytes from `at` on that are neither chunks of metadata, tags, nor zeros."""
    for _ in range(CHUNKS):
        if at >= total:
            return 0
        after = -1
        if chunks:  # some writers leave out the byte that pads a chunk
            starts = sorted({at + -at % chunks.align, at}, reverse=True)
            after = max(_after_metadata(peek, total, start, chunks) for start in starts)
        if after < 0:
            tag = peek(at, 4).lstrip(b"\0")[:3] in (b"ID3", b"TAG")
            return 0 if tag or _is_zero(peek, total, at) else total - at
        at = after
    return total - at


def _after_metadata(peek: Peek, total: int, at: int, chunks: Chunks) -> int:
    """The end of the chunk of metadata at `at`; -1 if there is none."""
    name, first, size = next(_chunks(peek, chunks, at), (b"", 0, -1))
    short = name[:4]
    if size < 0 or short in NOT_METADATA or not PRINTABLE.issuperset(short):
        return -1
    if chunks is W64 and name[4:] != W64_NAME:
        return -1
    return first + size if first + size <= total or short in METADATA else -1


def _end_of_samples(peek: Peek, total: int, first: int, chunks: Chunks) -> int:
    """Where samples from `first` on end whose size is not stated: at a chunk of metadata that
    reaches, with those behind it, the end of the file; at the end if there is none."""
    names = AIFF_METADATA if chunks.form == RIFX.form and peek(0, 4) == b"FORM" else METADATA
    start = max(first, total - LONGEST_METADATA)
    tail = peek(start, total - start)
    places = []
    for name in names:
        at = tail.find(name)
        while at >= 0:
            places.append(start + at)
            at = tail.find(name, at + 1)
    # From the end, because samples may look like a name, but not those behind the last chunk.
    nearest = sorted(places)[-CHAINS:]
    return next((at for at in nearest if _is_chain(peek, total, at, chunks)), total)


def _is_chain(peek: Peek, total: int, at: int, chunks: Chunks) -> bool:
    """Whether `at` begins chunks of metadata up to the end of the file. Four samples may look like
    a name, so either the size of the first chunk fits too, or its content is known."""
    head = peek(at, 12)
    size = struct.unpack(chunks.form, head[:8])[1] if len(head) >= 8 else total
    known = head[8:].startswith(INNER.get(head[:4], ()))
    if known and _is_placeholder(size):
        return True
    return (known or at + 8 + size <= total) and not _unexplained(peek, total, at, chunks)


def _is_zero(peek: Peek, total: int, at: int) -> bool:
    return not any(any(peek(i, ZEROS)) for i in range(at, total, ZEROS))
