"""Headers of audio containers against what is there: truncated, lying, followed by other bytes."""

from __future__ import annotations

import io
import struct
from typing import Any

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from d2v_ds.data import audio
from d2v_ds.data.checks import Unusable

FRAMES = 4000
KINDS = [  # (format, subtype, endian) whose headers state a length
    *(("WAV", s, "FILE") for s in ("PCM_16", "PCM_U8", "PCM_24", "FLOAT", "ULAW", "MS_ADPCM")),
    *(("WAV", s, "BIG") for s in ("PCM_16", "DOUBLE")),
    *(("WAV", s, "FILE") for s in ("GSM610", "G721_32", "NMS_ADPCM_16")),
    *((k, s, "FILE") for k in ("WAVEX", "RF64", "W64") for s in ("PCM_16", "PCM_24", "FLOAT")),
    *(("AIFF", s, "FILE") for s in ("PCM_16", "PCM_S8", "FLOAT", "DOUBLE", "ALAW", "IMA_ADPCM")),
    *(("AIFF", s, "LITTLE") for s in ("PCM_16",)),
    *(("AU", s, e) for s in ("PCM_16", "ULAW", "FLOAT", "G721_32") for e in ("FILE", "LITTLE")),
    *(("CAF", s, "FILE") for s in ("PCM_16", "FLOAT", "ALAC_16")),
    *(("NIST", s, "FILE") for s in ("PCM_16", "PCM_24", "ULAW")),
    *(("VOC", s, "FILE") for s in ("PCM_16", "PCM_U8")),
    *(("SDS", s, "FILE") for s in ("PCM_S8", "PCM_24")),
    *(("SVX", "PCM_16", "FILE"), ("AVR", "PCM_16", "FILE"), ("WVE", "ALAW", "FILE")),
]
NOISE = np.random.default_rng(1).integers(128, 256, 30_000).astype(np.uint8).tobytes()


def made(
    kind: str, subtype: str, endian: str = "FILE", channels: int = 1, frames: int = FRAMES
) -> bytes:
    x = np.random.default_rng(0).uniform(-0.5, 0.5, (frames, channels))
    buffer, rate = io.BytesIO(), 8000 if kind == "WVE" else 16_000
    soundfile.write(buffer, x, rate, format=kind, subtype=subtype, endian=endian)
    return buffer.getvalue()


def kind_of(data: bytes) -> str:
    """The kind of the error for a file; "" if it is used."""
    try:
        with audio.Recording(data) as recording:
            recording.pcm()
    except Unusable as error:
        return error.kind
    return ""


@pytest.mark.parametrize("kind, subtype, endian", KINDS)
def test_every_container(kind: str, subtype: str, endian: str) -> None:
    data = made(kind, subtype, endian)
    expected = soundfile.read(io.BytesIO(data), dtype="float32")[0]
    with audio.Recording(data) as recording:
        x = audio.as_float(recording.pcm())
        if subtype == "GSM610":  # libsndfile decodes a block behind the last one
            assert len(x) == len(expected) - 320 >= FRAMES
            expected = expected[: len(x)]
        assert not recording.notes and not recording.repaired
        np.testing.assert_allclose(x, expected, atol=1e-7)
        part = audio.as_float(recording.pcm(1000, 500))
        if subtype not in ("MS_ADPCM", "IMA_ADPCM"):  # libsndfile seeks to blocks of these
            np.testing.assert_allclose(part, expected[1000:1500], atol=1e-7)
    for share in (0.2, 0.5, 0.9):
        cut = data[: int(len(data) * share)]
        assert kind_of(cut) in ("truncated", "damaged"), (share, kind_of(cut))
    # G72x, GSM and others have variable or unknown bytes per second.
    assert kind_of(data + NOISE * 3) == "length"


@pytest.mark.parametrize("kind", ["WAV", "RF64", "W64", "AIFF", "AU", "CAF", "NIST", "VOC", "AVR"])
@pytest.mark.parametrize("channels", [1, 2])
def test_bytes_behind_the_samples_are_not_decoded(kind: str, channels: int) -> None:
    data = made(kind, "PCM_16", channels=channels)
    if kind != "AVR":  # without chunks, and libsndfile does not tell where the samples end
        for few in (bytes(5000), b"TAG" + bytes(125), NOISE[:20]):
            with audio.Recording(data + few) as recording:
                assert recording.info.frames == len(recording.pcm()) == FRAMES
                noted = [note.kind for note in recording.notes]
                assert noted == (["length corrected"] if few == NOISE[:20] else [])
    assert kind_of(data + data * 5) == "length"


def sizes(data: bytes, riff: int | None = None, samples: int | None = None) -> bytes:
    """A WAV with other sizes in its headers."""
    at = data.index(b"data") + 4
    riff = int.from_bytes(data[4:8], "little") if riff is None else riff
    samples = int.from_bytes(data[at : at + 4], "little") if samples is None else samples
    return (
        data[:4]
        + struct.pack("<I", riff)
        + data[8:at]
        + struct.pack("<I", samples)
        + data[at + 4 :]
    )


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24", "FLOAT", "ULAW"])
@pytest.mark.parametrize("size", [0, 0x7FFFF000, 0x80000000, 0xFFFFFFFF, 0xFFFFFFFF - 36])
def test_streaming_writers_state_no_length(subtype: str, size: int) -> None:
    data = made("WAV", subtype)
    expected = audio.decode(data)
    with audio.Recording(sizes(data, size, size)) as recording:
        assert (audio.as_float(recording.pcm()) == expected).all()
        assert recording.repaired and not recording.notes


def test_sizes_of_wav() -> None:
    data = made("WAV", "PCM_16")
    expected = audio.decode(data)
    for riff in (0, 5, len(data), len(data) + 99, 0xFFFFFFFF):
        assert (audio.decode(sizes(data, riff)) == expected).all(), riff
    with pytest.raises(Unusable, match=r"has 7000 bytes \(0\.22 s\) behind the samples") as raised:
        audio.decode(sizes(data, samples=1000))
    assert raised.value.kind == "length"
    assert kind_of(sizes(data, samples=8002)) == "truncated"
    assert kind_of(sizes(data, samples=0xF0000000)) == "truncated", "not a placeholder"
    assert kind_of(sizes(data[:44], samples=0)) == "empty"


def chunk(name: bytes, content: bytes) -> bytes:
    return name + struct.pack("<I", len(content)) + content + bytes(len(content) % 2)


@pytest.mark.parametrize(
    "after",
    [
        chunk(b"LIST", b"INFOISFT" + struct.pack("<I", 4) + b"Lavf"),
        chunk(b"bext", bytes(602)) + chunk(b"iXML", b"<a/>" * 900),
        chunk(b"LIST", b"odd")[:-1] + chunk(b"id3 ", bytes(range(128)) * 30),
        chunk(b"junk", NOISE),
        chunk(b"LIST", NOISE)[:-5],
    ],
)
@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_U8", "FLOAT"])
def test_metadata_behind_the_samples(after: bytes, subtype: str) -> None:
    data = made("WAV", subtype)
    with audio.Recording(data + after) as recording:
        assert (audio.as_float(recording.pcm()) == audio.decode(data)).all()
        assert not recording.notes and not recording.repaired


METADATA = [
    chunk(b"LIST", b"INFOISFT" + struct.pack("<I", 4) + b"Lavf"),
    chunk(b"bext", bytes(602)) + chunk(b"iXML", b"<a/>" * 900),
    chunk(b"LIST", b"INFOISFT" + struct.pack("<I", 5) + b"Lavf5") + chunk(b"id3 ", b"ID3" + NOISE),
    chunk(b"id3 ", b"ID3" + NOISE) + bytes(10),
    chunk(b"LIST", b"INFO" + NOISE)[:-5],
    b"LIST" + bytes(4) + b"INFOISFT" + struct.pack("<I", 4) + b"Lavf",
]


@pytest.mark.parametrize("after", METADATA)
@pytest.mark.parametrize("size", [0, 0x7FFFF000, 0xFFFFFFFF])
@pytest.mark.parametrize("kind", ["WAV/PCM_16", "WAV/PCM_24", "WAV/IMA_ADPCM", "RF64/PCM_16"])
def test_metadata_behind_samples_without_a_size(after: bytes, size: int, kind: str) -> None:
    data = made(*kind.split("/"))
    if kind.startswith("RF64"):
        unsized = data[:20] + struct.pack("<QQ", 0, 0) + data[36:] + after
    else:
        unsized = sizes(data, size, size) + after
    assert np.array_equal(audio.decode(unsized), audio.decode(data))


@pytest.mark.parametrize("size", [0, 0xFFFFFFFF])
def test_metadata_of_aiff_behind_samples_without_a_size(size: int) -> None:
    data = made("AIFF", "PCM_16")
    at = data.index(b"SSND") + 4
    unsized = data[:at] + struct.pack(">I", size) + data[at + 4 :]
    for after in (b"", b"ANNO" + struct.pack(">I", 6) + b"remark", b"ID3 \0\0\0\x0bID3" + bytes(9)):
        assert np.array_equal(audio.decode(unsized + after), audio.decode(data))


def test_a_chunk_without_padding_in_the_header() -> None:
    data = made("WAV", "PCM_16")
    at = data.index(b"data")
    padded = data[:at] + chunk(b"LIST", b"INFOx") + data[at:]
    assert np.array_equal(audio.decode(padded), audio.decode(data))
    with pytest.raises(Unusable, match="chunk LIST of odd size without the byte that pads") as bad:
        audio.decode(data[:at] + chunk(b"LIST", b"INFOx")[:-1] + data[at:])
    assert bad.value.kind == "format"


def test_samples_that_look_like_metadata() -> None:
    """The name of a chunk in samples without a size does not end them."""
    for name in (b"LIST", b"id3 ", b"cue "):
        data = bytearray(sizes(made("WAV", "PCM_16"), 0, 0))
        data[1000:1004] = name
        with audio.Recording(bytes(data)) as recording:
            assert len(recording.pcm()) == FRAMES, name


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24", "FLOAT", "ALAW"])
@pytest.mark.parametrize("frames", [0, 1000, FRAMES, 3 * FRAMES])
def test_aiff_with_two_lengths(subtype: str, frames: int) -> None:
    data = made("AIFF", subtype)
    at = data.index(b"COMM") + 10
    changed = data[:at] + struct.pack(">I", frames) + data[at + 4 :]
    with audio.Recording(changed) as recording:
        assert np.array_equal(audio.as_float(recording.pcm()), audio.decode(data))
        notes = [note.kind for note in recording.notes]
    assert notes == (["length corrected"] if frames in (1000, 3 * FRAMES) else [])


def test_what_is_not_metadata() -> None:
    data = made("WAV", "PCM_16")
    for after in (chunk(b"data", NOISE), data, chunk(b"LIST", b"INFO") + NOISE):
        assert kind_of(data + after) == "length"


def test_rf64_of_a_streaming_writer() -> None:
    data = made("RF64", "PCM_16")
    for size in (0, (1 << 64) - 1):
        streamed = data[:20] + struct.pack("<QQ", size, size) + data[36:]
        assert (audio.decode(streamed) == audio.decode(data)).all()


def test_compressed_and_odd_variants() -> None:
    data = made("NIST", "PCM_16")
    coding = b"sample_coding -s3 pcm"
    assert coding in data
    shorten = data.replace(coding, b"sample_coding -s26 pcm,embedded-shorten-v2.00").replace(
        b"\n" * 24, b"", 1
    )
    assert kind_of(shorten) == "format"
    voc = made("VOC", "PCM_16")
    assert kind_of(voc[:-1] + b"\x09" + voc[27:]) == "format", "two blocks of samples"


@pytest.mark.parametrize(
    "first, name",
    [
        (b"\0\0\0\x20ftypM4A ", "MP4 or M4A"),
        (b"\x1a\x45\xdf\xa3", "WebM"),
        (b"#!AMR\n", "AMR"),
        (bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c"), "WMA"),
        (b"ajkg\x02", "Shorten"),
    ],
)
def test_other_formats_say_what_to_do(first: bytes, name: str) -> None:
    with pytest.raises(Unusable, match=f"is {name}.*ffmpeg -i FILE FILE.flac") as raised:
        audio.info(first + bytes(500))
    assert raised.value.kind == "format"


def packed(data: bytes, at: int, form: str, *values: int) -> bytes:
    """The file with other numbers in its header."""
    field = struct.pack(form, *values)
    return data[:at] + field + data[at + len(field) :]


@pytest.mark.parametrize(
    "kind", ["WAV/PCM_16", "WAV/PCM_24", "WAV/ALAW", "RF64/FLOAT", "W64/PCM_16"]
)
def test_headers_that_contradict_themselves(kind: str) -> None:
    data = made(*kind.split("/"))
    at = data.index(b"fmt ") + (24 if kind.startswith("W64") else 8)
    assert kind_of(packed(data, at + 2, "<H", 3)) == "damaged", "channels"
    if kind == "RF64/FLOAT":
        assert kind_of(packed(data, at, "<H", 7)) == "damaged", "coding"
    assert kind_of(packed(data, at + 12, "<H", 6)) == "", "only the bytes of a frame"
    assert kind_of(packed(data, at + 8, "<I", 6)) == "", "only the bytes of a second"


def test_damaged_headers() -> None:
    nist = made("NIST", "PCM_16")
    for changed in (nist[:12] + b"64" + nist[14:], nist[:8] + b"    ffff" + nist[16:]):
        assert kind_of(changed) == "damaged"
    assert kind_of(packed(made("AU", "PCM_16"), 20, ">I", 257)) == "format", "channels"
    unsized = packed(packed(made("AU", "PCM_16"), 4, ">I", 1 << 30), 8, ">I", 0)
    assert kind_of(unsized) == "truncated"
    caf = made("CAF", "ALAC_16")
    assert kind_of(caf.replace(b"pakt", b"free")) == "damaged"
    several = made("CAF", "ALAC_16", frames=24_000)  # packets
    assert kind_of(several[:20_000] + bytes(len(several) - 20_000)) == "damaged"
    flac = made("FLAC", "PCM_16")
    assert kind_of(packed(flac, 21, ">BI", 0xFF, 0xFFFFFFFF)) == "damaged", "64 GiB"


@pytest.mark.parametrize("kind", ["W64/IMA_ADPCM", "AU/G721_32", "WAV/GSM610", "WAV/IMA_ADPCM"])
def test_tags_behind_compressed_samples(kind: str) -> None:
    data = made(*kind.split("/"))
    for after in (b"TAG" + bytes(125), bytes(100)):
        assert np.array_equal(audio.decode(data + after), audio.decode(data))


def test_sample_dumps_are_compared_with_their_header() -> None:
    data = made("SDS", "PCM_16")  # stores 21 bits
    assert len(audio.decode(data)) == FRAMES
    for cut in (data[:-127], data[:1000], data[:30]):
        assert kind_of(cut) == "truncated"
    assert kind_of(data + data[-127:] * 100) == "length"


@pytest.mark.parametrize(
    "kind, subtype", [("MAT4", "PCM_16"), ("MAT5", "FLOAT"), ("XI", "DPCM_16")]
)
def test_content_that_is_no_recording(kind: str, subtype: str) -> None:
    with pytest.raises(Unusable, match="not a recording; store it as WAV") as raised:
        audio.info(made(kind, subtype))
    assert raised.value.kind == "format"


HEADS = [made(*kind)[:300] for kind in KINDS if kind[0] != "AVR"]


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(HEADS), st.data())
def test_damaged_headers_are_named(head: bytes, data: Any) -> None:
    """Whatever a header says, the result is a waveform or an error with a kind."""
    changed = bytearray(head + NOISE[:2000])
    for at in data.draw(st.lists(st.integers(0, 60), min_size=1, max_size=4)):
        changed[at] = data.draw(st.integers(0, 255))
    x: NDArray[np.float32] | None = None
    try:
        x = audio.decode(bytes(changed))
    except Unusable:
        return
    assert 0 < len(x) <= 20 * len(changed)


@pytest.mark.parametrize("kind, subtype, endian", KINDS)
def test_every_short_beginning_is_named(kind: str, subtype: str, endian: str) -> None:
    data = made(kind, subtype, endian)
    for size in range(1, 100):
        assert kind_of(data[:size]) in ("truncated", "format", "damaged", "empty", "length"), size


@pytest.mark.parametrize(
    "kind, subtype",
    [("WAV", "IMA_ADPCM"), ("WAV", "GSM610"), ("AU", "G721_32"), ("CAF", "ALAC_16")],
)
def test_bytes_behind_compressed_samples(kind: str, subtype: str) -> None:
    """A second of compressed samples has few bytes; libsndfile decodes those of an AU."""
    data = made(kind, subtype)
    assert kind_of(data + NOISE[: len(data) // 2 * 2]) == "length"


@pytest.mark.parametrize("endian", ["FILE", "LITTLE"])
@pytest.mark.parametrize("size", [0, 0x7FFF_FFFF, 0xFFFF_FFFF])
def test_au_without_a_size(endian: str, size: int) -> None:
    data = made("AU", "PCM_16", endian)
    unsized = data[:8] + size.to_bytes(4, "little" if endian == "LITTLE" else "big") + data[12:]
    with audio.Recording(data) as whole, audio.Recording(unsized) as recording:
        assert np.array_equal(recording.pcm(), whole.pcm())


def test_caf_without_a_size() -> None:
    data = made("CAF", "PCM_16")
    at = data.index(b"data") + 4
    with audio.Recording(data) as whole:
        expected = whole.pcm()
    with audio.Recording(data[:at] + b"\xff" * 8 + data[at + 8 :]) as recording:
        assert np.array_equal(recording.pcm(), expected)
