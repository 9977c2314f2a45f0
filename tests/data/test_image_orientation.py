"""Image files: the orientation in their EXIF data."""

from __future__ import annotations

import io
import struct
from typing import Any

import numpy as np
import pytest
from PIL import Image

from d2v_ds.data import image_files, images
from d2v_ds.data.image_files import decode, inspect, open_image, stored
from tests.data.test_image_files import array, pixels
from tests.helpers.pictures import encoded, gradient


def tagged(kind: str, turn: int) -> bytes:
    """Stored so that orientation `turn` shows GREEN: the pixels are turned back."""
    back = {6: 8, 8: 6}.get(turn, turn)
    image = GREEN.transpose(image_files.TURNS[back]) if turn > 1 else GREEN
    exif = Image.Exif()
    exif[image_files.ORIENTATION] = turn
    options: dict[str, Any] = {"quality": 95} if kind == "JPEG" else {"lossless": True}
    return encoded(image, kind, exif=exif, **options)


GREEN = gradient(96, 64)  # red rises to the right, green downwards


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_images_are_turned_upright(kind: str, turn: int) -> None:
    data = tagged(kind, turn)
    made = stored(data)
    assert (made.width, made.height) == (96, 64)
    assert [note.kind for note in made.notes] == ["upright"] * (turn > 1)
    assert made.data == data or kind == "TIFF"
    assert inspect(data)[1:] == inspect(made.data)[1:] == (96, 64)
    limit = 12 if kind == "JPEG" else 0
    for seen in (decode(data), decode(made.data)):
        assert np.abs(array(seen) - array(GREEN)).max() <= limit and not seen.getexif()
    small = stored(data, 32)
    assert (small.width, small.height) == (48, 32)
    with Image.open(io.BytesIO(small.data)) as image:
        assert image.size == (48, 32) and image_files.ORIENTATION not in image.getexif()
        expected = GREEN.resize((48, 32), Image.Resampling.BICUBIC)
        assert np.abs(array(image) - array(expected)).max() <= 12


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("size", [12, 40, 64])
def test_crops_of_turned_images(turn: int, size: int) -> None:
    """A crop of the file equals that of the upright image, also if the JPEG is decoded small."""
    for box in ((0, 0, 96, 64), (8, 16, 72, 40), (64, 8, 32, 48)):
        expected = images.crop(GREEN, box, size).astype(float)
        for kind, limit in (("PNG", 1), ("JPEG", 14)):
            crop = images.crop(open_image(tagged(kind, turn)), box, size)
            assert np.abs(crop - expected).max() <= limit, (kind, box)
    whole = images.centre_crop(open_image(tagged("PNG", turn)), 32).astype(float)
    assert np.abs(whole - images.centre_crop(GREEN, 32)).max() <= 1
    first, second = (
        images.random_crop(image, 16, (0.2, 1.0), np.random.default_rng(turn)).astype(float)
        for image in (open_image(tagged("PNG", turn)), GREEN)
    )
    assert np.abs(first - second).max() <= 1


def test_exif_data_at_the_end_of_a_png() -> None:
    data = tagged("PNG", 6)
    at = data.index(b"eXIf") - 4
    (size,) = struct.unpack(">I", data[at : at + 4])
    chunk, end = data[at : at + 12 + size], data.index(b"IEND") - 4
    late = data[:at] + data[at + 12 + size : end] + chunk + data[end:]
    assert inspect(late) == ("png", 96, 64)
    assert np.array_equal(array(decode(late)), array(GREEN))
    crop = images.crop(open_image(late), (0, 0, 96, 64), 32).astype(float)
    assert np.abs(crop - images.crop(GREEN, (0, 0, 96, 64), 32)).max() <= 1


@pytest.mark.parametrize("exif", [b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"x" * 50])
def test_damaged_exif_data_does_not_matter(exif: bytes) -> None:
    data = encoded(GREEN, "JPEG", exif=exif)
    assert inspect(data) == ("jpg", 96, 64) and stored(data).notes == ()


@pytest.mark.parametrize("value", [0, 9, 255])
def test_orientations_that_do_not_exist_are_ignored(value: int) -> None:
    exif = Image.Exif()
    exif[image_files.ORIENTATION] = value
    data = encoded(GREEN, "JPEG", exif=exif)
    assert inspect(data) == ("jpg", 96, 64) and stored(data).notes == ()


def test_orientation_in_avif() -> None:
    exif = Image.Exif()
    exif[image_files.ORIENTATION] = 6
    made = stored(encoded(GREEN.transpose(Image.Transpose.ROTATE_90), "AVIF", exif=exif))
    assert (made.kind, made.width, made.height) == ("png", 96, 64)
    assert np.abs(pixels(made.data) - array(GREEN)).mean() < 4
