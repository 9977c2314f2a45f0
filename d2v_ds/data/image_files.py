"""Image files: opening, damage, orientation, depth and transparency.

    bytes --open_image--> opened, not decoded; deep or transparent images are RGB already
    bytes --decode--> 8-bit RGB, upright
    bytes --stored--> what a set holds: the same bytes, or a PNG or smaller image made from them

Pillow clips values of more than 8 bits, ignores the orientation in the EXIF data and shows what is
hidden behind transparent pixels. Here, values are scaled, images are turned upright, and
transparent pixels are white. Unusable images raise Unusable with the reason, without the file's
name.
"""

from __future__ import annotations

import io
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, TiffImagePlugin, UnidentifiedImageError, features

from d2v_ds.data.checks import Note, Unusable
from d2v_ds.data.headers import image_type
from d2v_ds.data.image_bytes import check_end, coded_bits, other_type
from d2v_ds.data.image_depth import Grey, bits_of, of_floats, of_integers, scaled

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "AVIF", "TGA",
           "QOI", "PCX", "SGI")  # fmt: skip
"""Pillow's names of the formats that are read: pictures, without documents and vector graphics."""

KINDS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
"""Formats that a set holds unchanged, and their extensions."""

OPTIONAL = {"avif": "avif", "jp2": "jpg_2000", "webp": "webp"}
"""Extensions of formats that some builds of Pillow lack, and Pillow's name of the feature."""

PLAIN = frozenset(("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr"))
"""Pillow's modes with 8 bits per channel and without transparency, apart from `info`."""

TRANSPARENT = frozenset(("LA", "La", "PA", "RGBA", "RGBa"))
ORIENTATION = 0x0112  # the EXIF tag (EXIF 2.32, section 4.6.4)
BITS, SAMPLES, PLANES, SAMPLE_FORMAT = 258, 277, 284, 339  # tags of TIFF 6.0
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""How to turn an image upright, by the value of the tag."""

TAGGED = ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif", "Raw profile type APP1")
"""Entries of Pillow's `info` that can hold the tag."""


@contextmanager
def pillow() -> Iterator[None]:
    """Turns Pillow's errors into Unusable."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            warnings.simplefilter("ignore", UserWarning)  # about unusual metadata
            yield
    except Unusable:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise Unusable("size", f"has too many pixels ({error})") from None
    except UnidentifiedImageError:  # its message has an address in memory
        raise Unusable("format", "cannot be read as an image (no known format)") from None
    except MemoryError:
        raise Unusable("size", "needs more memory than there is") from None
    except Exception as error:  # the plugins raise errors of many types for damaged files
        kind = _kind(str(error).lower())
        raise Unusable(kind, f"cannot be read as an image ({error})") from None


def _kind(message: str) -> str:
    for words, kind in (
        (("truncated", "unexpected end", "not enough"), "truncated"),
        (("not supported", "unsupported", "not available"), "format"),
        (("too large",), "size"),
    ):
        if any(word in message for word in words):
            return kind
    return "damaged"


# ----------------------------------------------------------------------------------------- reading


def open_image(data: bytes) -> Image.Image:
    """The image, opened but not decoded. An image with more than 8 bits per channel or with
    transparency is decoded as in `decode`. Raises Unusable if it is not an image or too large."""
    image = _open(data)
    return image if is_plain(image) else _rgb(image, data)


def decode(data: bytes) -> Image.Image:
    """The image as upright 8-bit RGB. Raises Unusable if it is not an image, damaged, or too
    large."""
    return _rgb(_open(data), data)


def as_image(raw: Any) -> Image.Image:
    """As `open_image`, from the bytes or the path of a file, a Pillow image, which stays unchanged,
    or uint8 pixels [h, w, 3], [3, h, w] or [h, w]. Raises ValueError."""
    if isinstance(raw, str | Path):
        raw = Path(raw).read_bytes()
    if isinstance(raw, bytes):
        return open_image(raw)
    if isinstance(raw, Image.Image):
        with pillow():
            image = raw.copy()
        return image if is_plain(image) else _rgb(image)
    pixels = np.asarray(raw)
    if pixels.ndim == 3 and pixels.shape[0] == 3:
        pixels = pixels.transpose(1, 2, 0)
    if pixels.dtype != np.uint8 or not (
        pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] == 3)
    ):
        raise ValueError(
            f"is {pixels.dtype} of shape {list(pixels.shape)}, expected an image file, a Pillow "
            "image, or uint8 pixels [h, w, 3], [3, h, w] or [h, w]"
        )
    if not pixels.size:
        raise Unusable("empty", "is empty")
    return Image.fromarray(np.ascontiguousarray(pixels))


def inspect(data: bytes) -> tuple[str, int, int]:
    """(extension, width, height) of an image, upright. The image is decoded completely, because
    only that shows damage. The extension is jpg, png or webp, else Pillow's name of the format.
    Raises Unusable."""
    image = _open(data)
    name = str(image.format)
    size = upright_size(image)
    if name in KINDS:
        _check(image)
    else:
        _rgb(image, data)
    return KINDS.get(name, name.lower()), *size


def _open(data: bytes) -> Image.Image:
    if not data:
        raise Unusable("empty", "is empty")
    name = image_type(data[:16])
    try:
        with pillow():
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        if not _is_misread(image):
            check_end(str(image.format), data)
            return image
    except Unusable as error:
        if error.kind == "format" and (other := other_type(data)):
            raise Unusable("format", f"is {other}") from None
        if error.kind != "format" or not name:
            raise
    if name in OPTIONAL and not features.check(OPTIONAL[name]):
        raise Unusable(
            "format", f"is {name}, which this Pillow cannot read; run `pip install -U pillow`"
        )
    if name == "tif" and (variant := _tiff_variant(data)):
        raise Unusable("format", f"is TIFF of {variant}, which Pillow cannot read")
    raise Unusable("damaged", "cannot be read as an image (its header is damaged or truncated)")


def _is_misread(image: Image.Image) -> bool:
    """Whether Pillow opens an image, but reads its samples as others: two variants of TIFF."""
    if image.format != "TIFF":
        return False
    tags = image.tag_v2  # type: ignore[attr-defined]
    bits = max(tags.get(BITS, (1,)))
    return (bits > 8 and tags.get(PLANES) == 2) or (bits == 8 and 2 in tags.get(SAMPLE_FORMAT, ()))


def _tiff_variant(data: bytes) -> str:
    """The samples of a TIFF file, such as `float16, 1 channel`; "" if its header is damaged."""
    with suppress(Unusable), pillow():
        file = io.BytesIO(data)
        tags = TiffImagePlugin.ImageFileDirectory_v2(file.read(8))
        file.seek(tags.next)
        tags.load(file)
        number = tags.get(SAMPLES, 1)
        kind = {2: "int", 3: "float"}.get(max(tags.get(SAMPLE_FORMAT, (1,))), "uint")
        planes = " in separate planes" if number > 1 and tags.get(PLANES) == 2 else ""
        return f"{kind}{max(tags[BITS])}, {number} channel{'s' * (number > 1)}{planes}"
    return ""


def _check(image: Image.Image) -> None:
    """Decodes an opened image completely. A JPEG is decoded at an eighth of its size in grey, which
    reads all of its data in a fraction of the time."""
    with pillow():
        if image.format in ("JPEG", "MPO"):
            image.draft("L", (1, 1))
        image.load()


def is_plain(image: Image.Image) -> bool:
    """Whether an image has 8 bits per channel and no transparency."""
    return image.mode in PLAIN and not _has_transparency(image) and not _is_deep(image)


def _has_transparency(image: Image.Image) -> bool:
    if image.mode in TRANSPARENT or "transparency" in image.info:
        return True
    return image.mode == "P" and image.palette is not None and image.palette.mode.endswith("A")


# ------------------------------------------------------------------------------------- orientation


def turn_of(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8, that is still to be applied. Raises Unusable."""
    # PNG has its EXIF data at the start or at the end; Pillow turns a TIFF when decoding it.
    if image.format in ("PNG", "TIFF"):
        with pillow():
            image.load()
    return _tag_of(image)


def _tag_of(image: Image.Image) -> int:
    if image.format == "TIFF" or any(name in image.info for name in TAGGED):
        with suppress(Unusable), pillow():  # damaged EXIF data; the picture can still be read
            tag = image.getexif().get(ORIENTATION)
            return tag if tag in TURNS else 1
    return 1


def upright_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) of the upright image. Raises Unusable."""
    turned = turn_of(image) >= 5
    return image.size[::-1] if turned else image.size


# ------------------------------------------------------------------------------ depth, transparency


def _rgb(
    image: Image.Image, data: bytes | None = None, notes: list[Note] | None = None
) -> Image.Image:
    """An opened image as upright 8-bit RGB, without metadata. data: its file. What is altered is
    appended to `notes`."""
    notes = [] if notes is None else notes
    deep, stated, tag = _is_deep(image), _stated_bits(image, data or b""), _tag_of(image)
    with pillow():
        turn = turn_of(image)
        if image.mode[0] in "IF":
            result = Image.fromarray(_grey(image, stated, notes)).convert("RGB")
        elif deep and data is not None:
            result = _on_white(_narrow(image, data, notes))
        elif _has_transparency(image):
            result = _on_white(image.convert("RGBA"))
        else:
            image.load()
            result = image.convert("RGB")
        bits = coded_bits(str(image.format), data or b"")
        if bits > 8 and not deep:
            notes.append(Note("depth", f"{bits} bits per channel became 8 bits"))
        notes += _upright(max(tag, turn))
        if turn in TURNS:
            result = result.transpose(TURNS[turn])
    profile = image.info.get("icc_profile") if image.mode in ("RGB", "RGBA", "P") else None
    result.info = {"icc_profile": profile} if profile else {}
    return result


def _upright(turn: int) -> list[Note]:
    if turn == 1:
        return []
    return [Note("upright", f"its EXIF orientation is {turn}: its pixels are not stored upright")]


def _on_white(image: Image.Image) -> Image.Image:
    """RGB or RGBA -> RGB, with white behind transparent pixels."""
    if image.mode == "RGBA" and image.getchannel("A").getextrema() != (255, 255):
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        white.alpha_composite(image)
        image = white
    return image.convert("RGB")


def _is_deep(image: Image.Image) -> bool:
    """Whether an opened image has more than 8 bits per channel."""
    return image.mode[0] in "IF" or any(_is_deep_tile(tile) for tile in _tiles(image))


def _is_deep_tile(tile: Any) -> bool:
    if tile.codec_name in ("ppm", "ppm_plain"):
        largest = tile.args[1]  # of the samples; text of one bit per pixel has none
        return isinstance(largest, int) and largest > 255
    name = _raw_mode(tile)
    return ";16" in name and not name.startswith("BGR")  # BGR;16: 16 bits for all channels


def _tiles(image: Image.Image) -> list[Any]:
    """How Pillow is going to decode an opened image; [] afterwards."""
    return getattr(image, "tile", [])


def _raw_mode(tile: Any) -> str:
    """Pillow's name of the arrangement of bits in the file, such as RGB;16B."""
    name = tile.args[0] if isinstance(tile.args, tuple) and tile.args else tile.args
    return name if isinstance(name, str) else ""


def _stated_bits(image: Image.Image, data: bytes) -> int:
    """Bits per sample that the file states; 0: none other than the size of its numbers."""
    if image.format == "PNG":
        at = data.find(b"sBIT", 0, max(0, data.find(b"IDAT")))
        return data[at + 4] if at > 0 else 0
    if image.format == "TIFF":
        bits = image.tag_v2.get(BITS, (0,))[0]  # type: ignore[attr-defined]
        return bits if 8 < bits < 16 else 0
    return 0


def _grey(image: Image.Image, stated: int, notes: list[Note]) -> Grey:
    """Pixels of an image of one deep channel. Raises Unusable if its scale is unknown."""
    values = np.asarray(image)
    tags = getattr(image, "tag_v2", {})
    if image.mode == "F":
        grey = of_floats(values, notes)
    else:
        most = tags.get(BITS, (32,))[0] - (tags.get(SAMPLE_FORMAT, (1,))[0] != 1)
        grey = of_integers(values, most, stated, notes)
    if tags.get(262) == 0:  # photometric interpretation: 0 is white
        grey = 255 - grey
    hidden = image.info.get("transparency")
    if isinstance(hidden, int):
        grey = np.where(values == hidden, np.uint8(255), grey)
    return grey


def _narrow(image: Image.Image, data: bytes, notes: list[Note]) -> Image.Image:
    """A colour image of 16 bits per channel, of which Pillow decodes the high bytes -> RGB or RGBA.
    If fewer bits are used, the low bytes are needed as well."""
    tiles = _tiles(_open(data))
    image.load()
    high = np.asarray(image)
    few = image.mode in ("RGB", "RGBA") and high[..., :3].max() < 1 << 6
    low = _low_bytes(data, tiles) if few else None
    if low is None or low.shape != high.shape:
        notes.append(Note("depth", "16 bits per channel became 8 bits"))
        return image.convert("RGBA" if _has_transparency(image) else "RGB")
    values = high.astype(np.uint16) << 8 | low
    bits = bits_of(int(values[..., :3].max()))
    notes.append(Note("depth", f"16 bits per channel, read as {bits} bits, became 8 bits"))
    parts = [scaled(values[..., :3], bits)]
    if high.shape[2] == 4:
        alpha = values[..., 3:]
        parts.append(scaled(alpha, bits_of(int(alpha.max()))))
    return Image.fromarray(np.concatenate(parts, axis=-1))


def _low_bytes(data: bytes, tiles: list[Any]) -> npt.NDArray[np.uint8] | None:
    """The low bytes of samples of 16 bits, decoded as the high ones of the other byte order; None
    if the format cannot do that."""
    swap = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}
    changed = []
    for tile in tiles:
        name = _raw_mode(tile)
        if name == "LA;16B":
            name = "RGBA"  # its four bytes: high and low of grey, high and low of alpha
        elif name.endswith((";16B", ";16L", ";16N")):
            name = name[:-1] + swap[name[-1]]
        else:
            return None
        changed.append(
            tile._replace(args=(name, *tile.args[1:]) if isinstance(tile.args, tuple) else name)
        )
    other = _open(data)
    other.tile = changed  # type: ignore[attr-defined]
    with suppress(Unusable), pillow():
        low = np.asarray(other)
        return low[..., [1, 1, 1, 3]] if _raw_mode(tiles[0]) == "LA;16B" else low
    return None


# ------------------------------------------------------------------------------------------ storing


class Stored(NamedTuple):
    """An image as a set holds it."""

    kind: str  # extension
    data: bytes
    width: int  # of the upright image, in pixels
    height: int
    notes: tuple[Note, ...]  # how it was altered


def stored(data: bytes, shorter: int | None = None, encode: str = "") -> Stored:
    """What a set holds for an image file: the same bytes if they are JPEG, PNG or WebP of 8 bits
    per channel, else a lossless RGB PNG. shorter: larger images are downsized so that the shorter
    side has this many pixels (bicubic), and stay JPEG or WebP (quality 95). encode: jpg or png, the
    format of all images. Raises Unusable."""
    image = _open(data)
    notes = _frames(image, data)
    own = "" if _is_deep(image) else KINDS.get(str(image.format), "")
    kind = encode or own or "png"
    large = shorter is not None and min(image.size) > shorter
    if kind == own and not large:
        notes += _upright(turn_of(image))
        w, h = upright_size(image)
        _check(image)
        return Stored(kind, data, w, h, tuple(notes))
    result = _rgb(image, data, notes)
    w, h = result.size
    if large and shorter is not None:
        factor = shorter / min(w, h)
        w, h = max(shorter, round(w * factor)), max(shorter, round(h * factor))
        result = result.resize((w, h), Image.Resampling.BICUBIC)
    return Stored(kind, encoded(result, kind), w, h, tuple(notes))


def encoded(image: Image.Image, kind: str) -> bytes:
    """An RGB image as the bytes of a file. Raises Unusable if the format has no images as wide or
    high as this one."""
    file = io.BytesIO()
    try:
        if kind == "jpg":
            image.save(file, "JPEG", quality=95, subsampling=0)
        elif kind == "webp":
            image.save(file, "WEBP", quality=95)
        else:
            image.save(file, "PNG")
    except (OSError, ValueError) as error:
        w, h = image.size
        raise Unusable("size", f"{w} x {h} pixels are too many for {kind} ({error})") from None
    return file.getvalue()


def _frames(image: Image.Image, data: bytes) -> list[Note]:
    """A note if the file has several pictures. Those of an MPO, which are previews or other views
    of the first, do not count."""
    if image.format in ("JPEG", "MPO"):
        return []
    several = True
    with suppress(Unusable), pillow():  # a damaged second picture
        # Looking for a second picture reads parts of the file.
        other = _open(data) if image.format in ("GIF", "TIFF") else image
        several = bool(getattr(other, "is_animated", False))
    return [Note("first frame", "only the first of its pictures is used")] if several else []
