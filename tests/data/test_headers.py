"""Lengths read from payload headers equal those of the decoders; only headers are read."""

from __future__ import annotations

import io
import struct
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image

from d2v_ds.data import audio, headers
from d2v_ds.data.checks import Unusable
from d2v_ds.data.headers import Length, SampleFormat, payload
from d2v_ds.data.tar_scan import Member
from d2v_ds.modalities import sample_formats
from tests.helpers.corpora import recording


def length_of(field: str, data: bytes) -> tuple[int, int]:
    """The length in the header of a payload in the middle of a file."""
    (read,) = (f.readers[field] for f in sample_formats() if field in f.readers)
    return tuple(read(io.BytesIO(b"x" * 100 + data + b"y" * 100), Member("", 100, len(data))))


def picture(kind: str, size: tuple[int, int] = (37, 21), **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (200, 30, 90)).save(buffer, kind, **options)
    return buffer.getvalue()


def npy(array: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, **options)
    return buffer.getvalue()


WHOLE = {
    "flac": recording("flac"),
    "wav": recording("wav"),
    "jpg": picture("JPEG"),
    "png": picture("PNG"),
    "webp": picture("WEBP"),
    "npy": npy(np.zeros(99, np.uint16)),
}


# ------------------------------------------------------------------------------------------- audio


@pytest.mark.parametrize("kind", ["wav", "flac"])
@pytest.mark.parametrize("rate, channels", [(16_000, 1), (44_100, 2), (8000, 6)])
def test_audio(kind: str, rate: int, channels: int) -> None:
    data = recording(kind, seconds=0.1234, rate=rate, channels=channels)
    info = audio.info(data)
    assert length_of(kind, data) == (info.frames, info.rate)


def test_wav_with_other_chunks() -> None:
    buffer = io.BytesIO()
    with soundfile.SoundFile(buffer, "w", 22_050, 1, "PCM_24", format="WAV") as file:
        file.title = "odd" * 7
        file.write(np.zeros(777))
    assert length_of("wav", buffer.getvalue()) == (777, 22_050)


def wav(*chunks: tuple[bytes, bytes]) -> bytes:
    body = b"".join(
        name + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2)
        for name, data in chunks
    )
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WAVE" + body


FORMAT = b"fmt ", struct.pack("<HHIIHH", 1, 2, 8000, 32_000, 4, 16)


def test_wav_chunks() -> None:
    odd = b"LIST", b"odd"
    assert length_of("wav", wav(FORMAT, odd, (b"data", bytes(400)))) == (100, 8000)
    for chunks, reason in (
        ([FORMAT, odd], "has no data"),
        ([(b"data", bytes(400)), FORMAT], "has no format before its data"),
        ([(b"fmt ", b""), (b"data", bytes(400))], "has no format before its data"),
    ):
        with pytest.raises(ValueError, match=rf"^\.wav: {reason}"):
            length_of("wav", wav(*chunks))


def test_flac_without_a_length() -> None:
    """Written by an encoder that could not seek back."""
    data = bytearray(WHOLE["flac"])
    data[21] &= 0xF0  # STREAMINFO: 36 bits of total samples
    data[22:26] = bytes(4)
    with pytest.raises(ValueError, match=r"^\.flac: .*streamed FLAC"):
        length_of("flac", bytes(data))


# ------------------------------------------------------------------------------------------ images


@pytest.mark.parametrize(
    "field, data",
    [
        ("jpg", picture("JPEG")),
        ("jpeg", picture("JPEG", progressive=True, exif=b"Exif\0\0" + bytes(30_000))),
        ("jpg", picture("JPEG", restart_marker_blocks=1, comment=b"x" * 9000)),
        ("png", picture("PNG")),
        ("webp", picture("WEBP")),
        ("webp", picture("WEBP", lossless=True)),
        ("webp", picture("WEBP", exif=b"Exif\0\0" + bytes(100))),
    ],
)
def test_images(field: str, data: bytes) -> None:
    assert length_of(field, data) == (37 * 21, 0)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_large_images(kind: str) -> None:
    """Sides of more than 8 and 12 bits."""
    field = {"JPEG": "jpg"}.get(kind, kind.lower())
    assert length_of(field, picture(kind, (5000, 300))) == (5000 * 300, 0)


@pytest.mark.parametrize("field", ["jpg", "png", "webp"])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_images_with_a_wrong_extension(field: str, kind: str) -> None:
    """Decoding does not depend on the extension."""
    assert length_of(field, picture(kind)) == (37 * 21, 0)


@pytest.mark.parametrize(
    ("data", "kind"),
    [(b"", "empty"), (b"text", "format"), (picture("PNG")[:20], "truncated"),
     (picture("JPEG")[:30], "damaged")],
)  # fmt: skip
def test_reasons_of_images_have_kinds(data: bytes, kind: str) -> None:
    with pytest.raises(Unusable) as error:
        length_of("jpg", data)
    assert error.value.kind == kind


def test_fill_bytes_between_jpeg_markers() -> None:
    data = WHOLE["jpg"]
    assert length_of("jpg", data[:2] + b"\xff" * 3 + data[2:]) == (37 * 21, 0)


# ------------------------------------------------------------------------------------------ arrays


def test_arrays() -> None:
    assert length_of("npy", WHOLE["npy"]) == (99, 0)
    assert length_of("npy", npy(np.zeros(0, np.uint32))) == (0, 0)
    assert length_of("npy", npy(np.zeros(5, np.uint16), version=(2, 0))) == (5, 0)
    # Many samples, not one.
    with pytest.raises(ValueError, match=r"^\.npy: holds uint32 of shape \(7, 128\)"):
        length_of("npy", npy(np.zeros((7, 128), np.uint32)))


# -------------------------------------------------------------------------------------- all formats


@pytest.mark.parametrize("field", WHOLE)
def test_other_content(field: str) -> None:
    for data in (b"", b"x", b"x" * 500, WHOLE[field][:9], b"RIFF" + bytes(200)):
        with pytest.raises(ValueError, match=rf"^\.{field}: "):
            length_of(field, data)


def test_truncation_that_headers_reveal() -> None:
    for field in ("wav", "npy"):
        with pytest.raises(ValueError, match="is truncated"):
            length_of(field, WHOLE[field][:-8])


class Counted(io.BytesIO):
    """Counts the bytes that are read."""

    count = 0

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(size)
        self.count += len(data)
        return data


def test_only_headers_are_read() -> None:
    large = {
        "flac": recording("flac", seconds=2),
        "wav": recording("wav", seconds=2),
        "jpg": picture("JPEG", exif=b"Exif\0\0" + bytes(30_000)),
        "png": picture("PNG", (500, 500)),
        "npy": npy(np.zeros(90_000, np.uint16)),
    }
    for field, data in large.items():
        (read,) = (f.readers[field] for f in sample_formats() if field in f.readers)
        file = Counted(data)
        read(file, Member("", 0, len(data)))
        assert 0 < file.count < 200, field


def test_payload_stays_within_the_member() -> None:
    file, member = io.BytesIO(b"before" + b"0123456789" + b"after"), Member("m", 6, 10)
    assert payload(file, member) == b"0123456789"
    assert payload(file, member, 7) == b"789"
    assert payload(file, member, 7, 2) == b"78"
    assert payload(file, member, 7, 100) == b"789"
    assert payload(file, member, 12) == payload(file, member, 12, 3) == b""


def test_the_fields_of_a_format() -> None:
    form = SampleFormat("speech", "frames", {"wav": headers.wav, "flac": headers.flac})
    assert form.fields == ("cls", "flac", "json", "txt", "wav")
    assert Length(7) == (7, 0)
