"""What the bytes of image files tell that Pillow does not."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from d2v_ds.data.checks import Unusable
from d2v_ds.data.image_bytes import coded_bits
from d2v_ds.data.image_files import decode, inspect, stored

PIXELS = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(80)


def encoded(kind: str, pixels: Any = PIXELS, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (HEIC, "is HEIC; convert it to JPEG first, for example with `heif-convert FILE FILE.jpg`"),
        (b"\n<!DOCTYPE html><html>", "is HTML, such as the page of an error"),
        (b"<html>not found</html>", "is HTML, such as the page of an error"),
        (b"%PDF-1.7\n", "is PDF"),
        (b"\xff\x0a\xfa\x1f", "is JPEG XL"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a pointer of Git LFS; fetch the fi"),
    ],
)
def test_other_files_with_names_of_images(data: bytes, reason: str) -> None:
    with pytest.raises(Unusable) as caught:
        stored(data)
    assert str(caught.value).startswith(reason) and caught.value.kind == "format"


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "1", "I;16"])
def test_damaged_pixels_of_png_are_found_by_their_checksum(mode: str) -> None:
    """Pillow does not compare the checksums of the pixels."""
    image = Image.fromarray(PIXELS)
    file = io.BytesIO()
    (image.convert("I").convert(mode) if mode == "I;16" else image.convert(mode)).save(file, "PNG")
    data = bytearray(file.getvalue())
    for read in (stored, decode, inspect):
        read(bytes(data) + b"junk")
    at = data.find(b"IDAT")
    size = int.from_bytes(data[at - 4 : at], "big")
    data[at + size // 2] ^= 1
    for read in (stored, decode, inspect):
        with pytest.raises(Unusable) as caught:
            read(bytes(data))
        assert caught.value.kind in ("damaged", "truncated")


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 2}])
def test_a_jpeg_whose_last_part_is_zeros(options: dict[str, Any]) -> None:
    """As downloads that were not finished leave it: Pillow decodes zeros."""
    pixels = np.asarray(Image.fromarray(PIXELS).resize((640, 480)))
    data = encoded("JPEG", pixels, **options)
    stored(data + bytes(1000))
    for share in (0.5, 0.9):
        end = int(len(data) * share)
        for read in (stored, decode, inspect):
            with pytest.raises(Unusable) as caught:
                read(data[:end] + bytes(len(data) - end))
            assert caught.value.kind == "truncated"


@pytest.mark.parametrize("kind", ["JPEG2000", "QOI"])
def test_other_formats_whose_last_part_is_missing(kind: str) -> None:
    data = encoded(kind)
    stored(data + b"junk")
    for cut in (data[:-1] + b"\0", data[:-200] + bytes(200)):
        with pytest.raises(Unusable) as caught:
            stored(cut)
        assert caught.value.kind == "truncated"


def test_a_png_that_lost_a_piece_of_its_pixels() -> None:
    data = encoded("PNG")
    with pytest.raises(Unusable) as caught:
        stored(data[:2000] + data[2010:])
    assert caught.value.kind in ("truncated", "damaged")


@pytest.mark.parametrize("size", ["3 2", "6 1"])
def test_bits_as_text(size: str) -> None:
    """PBM as text has no largest value."""
    pixels = np.asarray(decode(f"P1\n{size}\n1 0 1\n0 1 1\n".encode()))
    assert pixels[..., 0].ravel().tolist() == [0, 255, 0, 255, 0, 0]


@pytest.mark.parametrize(("signed", "bits"), [(True, 15), (False, 16)])
def test_the_sign_is_no_part_of_the_depth(signed: bool, bits: int) -> None:
    values = np.linspace(0, (1 << bits) - 1, 64 * 48).reshape(48, 64)
    file = io.BytesIO()
    image = Image.fromarray(values.astype(np.uint16))
    image.save(file, "TIFF", tiffinfo={339: 2 if signed else 1})
    result = stored(file.getvalue())
    pixels = np.asarray(decode(file.getvalue()))[..., 0]
    assert np.abs(pixels - values / ((1 << bits) - 1) * 255).max() <= 0.51
    assert f"read as {bits} bits" in result.notes[0].reason


def test_the_depth_of_jpeg_2000() -> None:
    data = bytearray(encoded("JPEG2000"))
    assert coded_bits("JPEG2000", data) == 8 and not stored(bytes(data)).notes
    at = data.find(b"\xff\x4f\xff\x51")
    for channel in range(3):
        data[at + 42 + 3 * channel] = 11
    [note] = stored(bytes(data)).notes
    assert note == ("depth", "12 bits per channel became 8 bits")


def test_the_depth_of_avif() -> None:
    data = bytearray(encoded("AVIF"))
    assert coded_bits("AVIF", data) == 8 and not stored(bytes(data)).notes
    for flags, bits in ((0x40, 10), (0x60, 12)):
        data[data.find(b"av1C") + 6] |= flags
        assert coded_bits("AVIF", data) == bits
    assert coded_bits("AVIF", b"av1C\x81") == 0
