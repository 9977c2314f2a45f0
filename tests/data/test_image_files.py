"""Image files: damage, depth, transparency, and what a set holds."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, features

from d2v_ds.data import image_files, images
from d2v_ds.data.checks import ALTERED, LEFT_OUT, Unusable
from d2v_ds.data.headers import image_type
from d2v_ds.data.image_files import decode, inspect, open_image, stored
from d2v_ds.modalities.vision import Vision, VisionConfig
from tests.helpers.pictures import encoded, gradient

Array = npt.NDArray[Any]


def array(image: Image.Image) -> Array:
    return np.asarray(image, dtype=float)


def pixels(data: bytes) -> Array:
    """[h, w, 3], as a plain reader sees a file."""
    return array(Image.open(io.BytesIO(data)).convert("RGB"))


def kind_of(data: bytes) -> str:
    """Why an image cannot be used; every reader must give the same reason."""
    reasons = set()
    modality = Vision(VisionConfig(image_size=16, patch_size=4))
    for read in (
        decode,
        inspect,
        stored,
        lambda data: Vision.check_sample({"jpg": data}, {}),
        lambda data: modality.decode({"jpg": data}, None),
        lambda data: modality.decode({"jpg": data}, np.random.default_rng(0)),
    ):
        with pytest.raises(Unusable) as error:
            read(data)
        assert " at 0x" not in str(error.value)
        reasons.add(error.value.kind)
    [kind] = reasons
    assert kind in LEFT_OUT
    return kind


# ------------------------------------------------------------------------------------------ damage


SMOOTH = gradient(640, 480).resize((64, 48))
WHOLE = {
    kind: encoded(SMOOTH, kind)
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "AVIF", "JPEG2000")
}


@pytest.mark.parametrize("mode", ["1", "RGB", "L", "P", "LA", "RGBA", "CMYK", "YCbCr"])
def test_any_image_becomes_rgb(mode: str) -> None:
    data = encoded(gradient(20, 10).convert(mode), "TIFF")
    image = decode(data)
    assert image.mode == "RGB" and image.size == (20, 10)
    cropped = images.crop(open_image(data), (0, 0, 20, 10), 10)
    assert cropped.dtype == np.uint8 and cropped.shape == (3, 10, 10)


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"", "empty"),
        (b"<html>404</html>", "format"),
        (b"\xff\xd8\xff nothing", "damaged"),
        (WHOLE["JPEG"][:400], "truncated"),
        (WHOLE["JPEG"][:-200], "truncated"),
        (WHOLE["PNG"][:-60], "truncated"),
        (WHOLE["GIF"][:-200], "truncated"),
        (WHOLE["TIFF"][: len(WHOLE["TIFF"]) // 2], "truncated"),
        (WHOLE["BMP"][:-500], "truncated"),
        (WHOLE["PNG"][:60] + bytes(20) + WHOLE["PNG"][80:], "damaged"),
        (WHOLE["WEBP"][:40], "damaged"),
        (WHOLE["AVIF"][:-100], "truncated"),
        (WHOLE["AVIF"][:60], "damaged"),
        (WHOLE["JPEG2000"][: len(WHOLE["JPEG2000"]) // 2], "truncated"),
        (WHOLE["JPEG2000"][:30], "damaged"),
    ],
)
def test_every_reader_rejects_the_same_images(data: bytes, kind: str) -> None:
    assert kind_of(data) == kind


def test_an_image_with_too_many_pixels_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(gradient(12, 12))
    for limit in (100, 50):  # Pillow warns at the limit and raises at twice the limit
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        assert kind_of(data) == "size"


def test_a_png_that_claims_many_pixels_is_not_decoded() -> None:
    """2^31 pixels in 80 bytes."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    head = struct.pack(">IIBBBBB", 1 << 16, 1 << 15, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b""))
    assert kind_of(bomb + chunk(b"IEND", b"")) == "size"


def test_a_jpeg_is_checked_to_its_end() -> None:
    """The check decodes at a low resolution, and must find every truncation that decoding finds."""
    for options in ({}, {"progressive": True}, {"subsampling": 0}):
        whole = encoded(SMOOTH.resize((200, 160)), "JPEG", **options)
        for end in range(700, len(whole), 37):
            outcomes = []
            for read in (decode, inspect):
                try:
                    read(whole[:end])
                    outcomes.append("")
                except Unusable as error:
                    outcomes.append(error.kind)
            assert outcomes[0] == outcomes[1], (options, end)


def test_a_format_that_this_pillow_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_files, "FORMATS", ("JPEG", "PNG"))
    monkeypatch.setattr(features, "check", lambda name: name not in ("avif", "webp"))
    for kind in ("AVIF", "WEBP"):
        with pytest.raises(
            Unusable, match=f"is {kind.lower()}, .*`pip install -U pillow`"
        ) as error:
            decode(WHOLE[kind])
        assert error.value.kind == "format"


def test_an_image_that_is_too_long_for_its_new_format() -> None:
    with pytest.raises(Unusable, match="70000 x 1 pixels are too many for jpg") as error:
        stored(encoded(Image.new("L", (70_000, 1))), encode="jpg")
    assert error.value.kind == "size"


def test_converting_needs_no_torch() -> None:
    code = "import sys; from d2v_ds.data import images; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# ------------------------------------------------------------------------------------------- depth


RAMP = np.tile(np.linspace(0, 1, 256), (8, 1))  # black to white, from left to right


def deep(bits: int) -> Array:
    return np.rint(RAMP * ((1 << bits) - 1)).astype(np.uint16)


def raw_png(values: Array, colour: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of 16 bits; values [h, w] or [h, w, c]; colour: its colour type."""
    lines = [b"\0" + row.astype(">u2").tobytes() for row in values]
    h, w = values.shape[:2]
    parts = [
        (b"IHDR", struct.pack(">IIBBBBB", w, h, 16, colour, 0, 0, 0)),
        *chunks,
        (b"IDAT", zlib.compress(b"".join(lines))),
        (b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in parts
    )


def pnm(values: Array, largest: int) -> bytes:
    kind = "P6" if values.ndim == 3 else "P5"
    return (
        f"{kind} {values.shape[1]} {values.shape[0]} {largest}\n".encode()
        + values.astype(">u2").tobytes()
    )


def raw_tiff(values: Array, **tags: int) -> bytes:
    """A TIFF of 16 bits per channel, values [h, w, 3], uncompressed, little-endian. tags: further
    ones, by `t` and their number."""
    h, w = values.shape[:2]
    pixels = values.astype("<u2").tobytes()
    start = 8 + 2 + 12 * (9 + len(tags)) + 4
    longs = {256: w, 257: h, 273: start + 6, 278: h, 279: len(pixels)}
    shorts = {258: start, 259: 1, 262: 2, 277: 3}
    shorts |= {int(name[1:]): value for name, value in tags.items()}
    entries = [(tag, 4, 1, value) for tag, value in longs.items()]
    entries += [(tag, 3, 3 if tag == 258 else 1, value) for tag, value in shorts.items()]
    rows = b"".join(struct.pack("<HHII", *entry) for entry in sorted(entries))
    head = b"II*\0" + struct.pack("<IH", 8, len(entries)) + rows + bytes(4)
    return head + struct.pack("<3H", 16, 16, 16) + pixels


def rgb(values: Array) -> Array:
    return np.stack([values] * 3, -1)


DEEP = {
    "png": encoded(Image.fromarray(deep(16))),
    "png, 12 bits": encoded(Image.fromarray(deep(12))),
    "png, 10 bits": encoded(Image.fromarray(deep(10))),
    "png, 14 bits": encoded(Image.fromarray(deep(14))),
    "png, sBIT": raw_png(deep(12), 0, (b"sBIT", b"\x0c")),
    "png, sBIT, full range": raw_png(deep(16), 0, (b"sBIT", b"\x0c")),
    "png rgb": raw_png(rgb(deep(16)), 2),
    "png rgb, 12 bits": raw_png(rgb(deep(12)), 2),
    "png grey and alpha": raw_png(np.dstack([deep(16), np.full(RAMP.shape, 65535)]), 4),
    "png grey and alpha, 12 bits": raw_png(np.dstack([deep(12), np.full(RAMP.shape, 4095)]), 4),
    "png rgba": raw_png(np.dstack([rgb(deep(16)), np.full(RAMP.shape, 65535)]), 6),
    "png rgba, 12 bits": raw_png(np.dstack([rgb(deep(12)), np.full(RAMP.shape, 4095)]), 6),
    "tiff": encoded(Image.fromarray(deep(16)), "TIFF"),
    "tiff lzw, 12 bits": encoded(Image.fromarray(deep(12)), "TIFF", compression="tiff_lzw"),
    "tiff, 32 bits": encoded(Image.fromarray(deep(16).astype(np.int32)), "TIFF"),
    "tiff, float": encoded(Image.fromarray(RAMP.astype(np.float32)), "TIFF"),
    "tiff, float 255": encoded(Image.fromarray((RAMP * 255).astype(np.float32)), "TIFF"),
    "pgm": pnm(deep(16), 65535),
    "pgm, 12 bits": pnm(deep(12), 4095),
    "tiff rgb, 12 bits": raw_tiff(rgb(deep(12))),
    "tiff rgb": raw_tiff(rgb(deep(16))),
    "ppm": pnm(rgb(deep(16)), 65535),
    "ppm as text": b"P3 256 8 65535 " + b" ".join(b"%d" % v for v in rgb(deep(16)).flat),
    "ppm, 12 bits": pnm(rgb(deep(12)), 4095),
    "jpeg 2000": encoded(Image.fromarray(deep(16)), "JPEG2000"),
}


@pytest.mark.parametrize("name", DEEP)
def test_deep_images_keep_their_grey_levels(name: str) -> None:
    expected = rgb(np.rint(RAMP * 255))
    made = stored(DEEP[name])
    assert made.kind == "png" and (made.width, made.height) == (256, 8)
    [note] = made.notes
    assert note.kind == "depth" and "8 bits" in note.reason
    for seen in (pixels(made.data), array(decode(DEEP[name])), array(decode(made.data))):
        assert len(np.unique(seen)) == 256 and np.abs(seen - expected).max() <= 1
    # Crops see the scale of the whole image.
    dark = images.crop(open_image(DEEP[name]), (0, 0, 16, 8), 8)
    assert dark.max() <= 16


def test_rounding_of_sixteen_bits() -> None:
    """Divided by 257, rounded."""
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    seen = array(decode(encoded(Image.fromarray(values))))[..., 0]
    assert np.array_equal(seen, np.floor(values / 257 + 0.5))


def test_white_is_zero() -> None:
    image = Image.fromarray(deep(16))
    data = encoded(image, "TIFF", tiffinfo={262: 0})
    if Image.open(io.BytesIO(data)).tag_v2[262] != 0:  # type: ignore[attr-defined]
        at = data.index(struct.pack("<HHI", 262, 3, 1)) + 8
        data = data[:at] + struct.pack("<H", 0) + data[at + 2 :]
    seen = array(decode(data))[0, :, 0]
    assert seen[0] == 255 and seen[-1] == 0


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (np.array([[np.nan, 0.5]]), "not finite"),
        (np.array([[np.inf, 0.5]]), "not finite"),
        (np.array([[-0.1, 0.5]]), "range"),
        (np.array([[0, 1.6]]), "range"),
        (np.array([[0, 4000.0]]), "range"),
    ],
)
def test_floating_point_images_without_a_known_scale(values: Array, kind: str) -> None:
    assert kind_of(encoded(Image.fromarray(values.astype(np.float32)), "TIFF")) == kind


def test_negative_integers_have_no_scale() -> None:
    assert kind_of(encoded(Image.fromarray(np.array([[-1000, 3000]], np.int32)), "TIFF")) == "range"


@pytest.mark.parametrize(
    ("data", "variant"),
    [
        (raw_tiff(rgb(deep(16)), t284=2), "uint16, 3 channels in separate planes"),
        (raw_tiff(rgb(deep(16)), t339=3), "float16, 3 channels"),
        (raw_tiff(rgb(deep(16)), t339=2), "int16, 3 channels"),
        (encoded(Image.fromarray(deep(8).astype(np.uint8)), "TIFF", tiffinfo={339: 2}),
         "int8, 1 channel"),
    ],
)  # fmt: skip
def test_variants_of_tiff_that_pillow_misreads_or_refuses(data: bytes, variant: str) -> None:
    assert kind_of(data) == "format"
    with pytest.raises(Unusable, match=f"^is TIFF of {variant}, which Pillow cannot read$"):
        stored(data)


def test_bmp_of_sixteen_bits_per_pixel_is_not_deep() -> None:
    """5 or 6 bits per channel."""
    head = struct.pack("<IiiHHIIiiII", 40, 4, 2, 1, 16, 0, 16, 0, 0, 0, 0)
    data = b"BM" + struct.pack("<IHHI", 70, 0, 0, 54) + head + struct.pack("<H", 0x7FFF) * 8
    made = stored(data)
    assert made.notes == () and (pixels(made.data) == 255).all()


# ----------------------------------------------------------------------------- transparency, colour


def transparent(mode: str) -> Image.Image:
    """The left half is opaque red or grey, the right half is black and transparent."""
    image = Image.new("RGBA", (8, 4), (200, 30, 30, 255))
    image.paste((0, 0, 0, 0), (4, 0, 8, 4))
    if mode == "P":
        flat = Image.new("P", (8, 4), 1)
        flat.putpalette([0, 0, 0, 200, 30, 30])
        flat.paste(0, (4, 0, 8, 4))
        return flat
    return image.convert(mode)


@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        ("RGBA", "PNG"),
        ("LA", "PNG"),
        ("P", "PNG"),
        ("RGBA", "WEBP"),
        ("RGBA", "TIFF"),
        ("P", "GIF"),
    ],
)
def test_transparent_pixels_are_white(mode: str, kind: str) -> None:
    options = {"transparency": 0} if mode == "P" else {}
    if kind == "WEBP":
        options = {"lossless": True}
    data = encoded(transparent(mode), kind, **options)
    made = stored(data)
    assert (made.data == data) == (kind in ("PNG", "WEBP"))
    for seen in (decode(data), decode(made.data)):
        assert (array(seen)[:, 4:] == 255).all() and array(seen)[0, 0].max() < 255
    right = images.crop(open_image(data), (4, 0, 4, 4), 4)
    assert (right == 255).all()


def test_partly_transparent_pixels_are_mixed_with_white() -> None:
    data = encoded(Image.new("RGBA", (3, 3), (0, 100, 200, 51)))
    assert np.abs(array(decode(data))[0, 0] - [204, 224, 244]).max() <= 1


@pytest.mark.parametrize("options", [{}, {"progressive": True}])
def test_cmyk_jpegs(options: dict[str, Any]) -> None:
    """Adobe stores them inverted; Pillow writes and reads them in the same way."""
    data = encoded(gradient(64, 32).convert("CMYK"), "JPEG", quality=95, **options)
    assert stored(data).data == data
    assert np.abs(array(decode(data)) - array(gradient(64, 32))).mean() < 3


# ------------------------------------------------------------------------------------------ storing


@pytest.mark.parametrize(
    ("kind", "extension"), [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp"), ("BMP", "bmp")]
)
def test_inspect(kind: str, extension: str) -> None:
    assert inspect(encoded(gradient(30, 20), kind)) == (extension, 30, 20)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "JPEG2000"])
def test_usual_files_are_stored_unchanged_or_as_png(kind: str) -> None:
    data = encoded(gradient(30, 20), kind)
    made = stored(data)
    assert made[2:] == (30, 20, ())
    if kind in ("JPEG", "PNG", "WEBP"):
        assert made.data == data
    else:
        assert made.kind == "png" and np.array_equal(pixels(made.data), pixels(data))
    assert stored(data, encode="png")[0] == "png" and stored(data, encode="jpg")[0] == "jpg"


def test_downsizing() -> None:
    for kind, extension in (("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp"), ("BMP", "png")):
        made = stored(encoded(gradient(90, 300), kind), 30)
        assert inspect(made.data) == (extension, 30, 100) == (made.kind, made.width, made.height)
        theirs = gradient(90, 300).resize((30, 100), Image.Resampling.BICUBIC)
        assert np.abs(array(decode(made.data)) - array(theirs)).mean() < 3


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_the_first_frame_of_an_animation_is_used(kind: str) -> None:
    frames = [Image.new("RGB", (6, 4), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    made = stored(data)
    assert [note.kind for note in made.notes] == ["first frame"] and "first frame" in ALTERED
    assert np.abs(pixels(made.data)[0, 0] - [255, 0, 0]).max() < 10


def test_the_type_of_a_file_is_seen_in_its_first_bytes() -> None:
    for kind, extension in (
        ("JPEG", "jpg"),
        ("PNG", "png"),
        ("WEBP", "webp"),
        ("GIF", "gif"),
        ("BMP", "bmp"),
        ("TIFF", "tif"),
        ("AVIF", "avif"),
        ("JPEG2000", "jp2"),
    ):
        assert image_type(encoded(gradient(9, 9), kind)[:16]) == extension
    for other in (b"", b"BM is a text", b"<html>", b"RIFF1234WAVEfmt "):
        assert image_type(other) == ""
