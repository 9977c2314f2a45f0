"""Why libsndfile does not read a file: its format, or the coding of its samples."""

from __future__ import annotations

from d2v_ds.data.checks import Unusable
from d2v_ds.data.containers import FFMPEG, FLOAT, PCM, Buffer, wav_coding

FORMATS = (  # (name, place, bytes)
    ("MP4 or M4A", 4, b"ftyp"),
    ("WebM or Matroska", 0, b"\x1a\x45\xdf\xa3"),
    ("WMA", 0, b"\x30\x26\xb2\x75\x8e\x66\xcf\x11"),
    ("AMR", 0, b"#!AMR"),
    ("AAC", 0, b"\xff\xf1"),
    ("AAC", 0, b"\xff\xf9"),
    ("WavPack", 0, b"wvpk"),
    ("Monkey's Audio", 0, b"MAC "),
    ("Shorten", 0, b"ajkg"),
    ("Speex", 28, b"Speex   "),
)
READ = (PCM, 2, FLOAT, 6, 7, 0x11, 0x31, 0x40, 0x50, 0x55, 0x64)  # codings that libsndfile reads


def why(data: Buffer) -> Unusable | None:
    """The reason, with what to do; None if it is not known."""
    for name, place, first in FORMATS:
        if data[place : place + len(first)] == first:
            return Unusable("format", f"is {name}, which libsndfile does not read; {FFMPEG}")
    coding, bits = wav_coding(lambda at, number: data[at : at + number])
    if coding == FLOAT and bits not in (32, 64):
        what = f"{bits}-bit float samples", "store it with 32-bit float or 16-bit integer samples"
    elif coding == PCM and not 0 < bits <= 32:
        what = f"{bits}-bit integer samples", "store it with 16 bits"
    elif coding and coding not in READ:
        what = f"samples of coding {coding:#06x}", FFMPEG
    else:
        return None
    return Unusable("format", f"is a WAV with {what[0]}, which libsndfile does not read; {what[1]}")
