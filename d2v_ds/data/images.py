"""One image: decoding, crops, augmentation, normalisation.

    open_image (image_files.py) --jitter, random_crop, random_flip, or centre_crop-->
        uint8 [3, h, w] --normalise, on the device--> float32

The crop is chosen before decoding, so that a JPEG is decoded no larger than needed; h, w pixels of
the upright image. All randomness comes from the generator that is passed in. Unusable images raise
ValueError with the reason, without the file's name.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageEnhance

from d2v_ds.data.checks import Unusable
from d2v_ds.data.image_files import TURNS, pillow, turn_of, upright_size

if TYPE_CHECKING:  # converting images needs no torch
    from torch import Tensor

Pixels = npt.NDArray[np.uint8]  # [3, h, w]
Box = tuple[int, int, int, int]  # left, top, width, height

MEAN = (0.485, 0.456, 0.406)  # of ImageNet's pixels in [0, 1], by channel
STD = (0.229, 0.224, 0.225)
ATTEMPTS = 10  # at placing a crop of the drawn area and aspect ratio
ASPECT = (3 / 4, 4 / 3)
MOST = 89_478_485  # pixels of an image that is resized as a whole; Pillow's limit for files
RESIZE = 256 / 224  # the shorter side before a centre crop, relative to the crop


# ------------------------------------------------------------------------------------------- crops


def random_crop(
    image: Image.Image, size: int, scale: tuple[float, float], rng: np.random.Generator
) -> Pixels:
    """A random crop, with a fraction of the area in `scale` and a random aspect ratio, resized
    (bicubic) to size x size: torchvision's RandomResizedCrop, which MAE, BEiT and data2vec use.
    Raises ValueError."""
    return crop(image, random_box(*upright_size(image), scale, rng), size)


def random_box(w: int, h: int, scale: tuple[float, float], rng: np.random.Generator) -> Box:
    """The box of a random crop of a w x h image; if none fits, the largest one in the centre."""
    for _ in range(ATTEMPTS):
        area = w * h * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(math.log(ASPECT[0]), math.log(ASPECT[1])))
        across, down = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < across <= w and 0 < down <= h:
            left = int(rng.integers(w - across + 1))
            top = int(rng.integers(h - down + 1))
            return left, top, across, down
    ratio = min(max(w / h, ASPECT[0]), ASPECT[1])
    across, down = min(w, round(h * ratio)), min(h, round(w / ratio))
    return (w - across) // 2, (h - down) // 2, across, down


def centre_crop(image: Image.Image, size: int) -> Pixels:
    """The central size x size pixels after resizing the shorter side to 256 / 224 * size, as
    torchvision's Resize and CenterCrop. Raises ValueError."""
    full = upright_size(image)
    factor = round(size * RESIZE) / min(full)
    w, h = max(size, round(full[0] * factor)), max(size, round(full[1] * factor))
    if w * h > MOST:  # of a strip of a few pixels by millions
        reason = f"{full[0]} x {full[1]} pixels: is too long for its width"
        raise Unusable("size", reason)
    left, top = (w - size) // 2, (h - size) // 2
    resized = _resize(_pixels(image, (0, 0, *full), (w, h)), (w, h))
    return resized[:, top : top + size, left : left + size]


def crop(image: Image.Image, box: Box, size: int) -> Pixels:
    """The box of an image, resized (bicubic, with antialiasing) to size x size. Raises
    ValueError."""
    return _resize(_pixels(image, box, (size, size)), (size, size))


def _pixels(image: Image.Image, box: Box, wanted: tuple[int, int]) -> Tensor:
    """uint8 [1, 4, h, w]: a box of the upright image that will be resized to `wanted` (w, h), as
    red, green, blue and an unused channel, because Pillow returns and torch resizes four channels
    faster than three. A JPEG that is at least twice as large is decoded at a half, quarter or
    eighth of its size."""
    import torch

    turn, full = turn_of(image), image.size
    if turn > 1:
        box = _as_stored(box, full, turn)
        wanted = wanted[::-1] if turn >= 5 else wanted
    left, top, w, h = box
    if image.format == "JPEG" and w >= 2 * wanted[0] and h >= 2 * wanted[1]:
        image.draft(None, (full[0] * wanted[0] // w, full[1] * wanted[1] // h))
    x, y = image.width / full[0], image.height / full[1]
    scaled = round(left * x), round(top * y), round((left + w) * x), round((top + h) * y)
    with pillow():
        cropped = image.crop(scaled)
        rgb = cropped if cropped.mode == "RGB" else cropped.convert("RGB")
        if turn > 1:
            rgb = rgb.transpose(TURNS[turn])
        # torch warns that the bytes are read-only; they are only read.
        flat = torch.frombuffer(rgb.tobytes("raw", "RGBX"), dtype=torch.uint8)
    return flat.view(1, rgb.height, rgb.width, 4).permute(0, 3, 1, 2)


def _as_stored(box: Box, full: tuple[int, int], turn: int) -> Box:
    """The box in the pixels of the file of a box in the upright image. full: (w, h) of the file."""
    left, top, w, h = (box[1], box[0], box[3], box[2]) if turn >= 5 else box
    if turn in (2, 3, 7, 8):
        left = full[0] - left - w
    if turn in (3, 4, 6, 7):
        top = full[1] - top - h
    return left, top, w, h


def _resize(pixels: Tensor, size: tuple[int, int]) -> Pixels:
    """The result of `_pixels` -> [3, h, w] for size (w, h). torch resizes bytes several times
    faster than Pillow; the results differ by at most two levels."""
    from torch.nn import functional as F

    h, w = size[::-1]
    if pixels.shape[2:] != (h, w):
        pixels = F.interpolate(pixels, (h, w), mode="bicubic", antialias=True)
    return np.ascontiguousarray(pixels[0, :3].numpy())


# ----------------------------------------------------------------------------------- augmentation


def random_flip(pixels: Pixels, rng: np.random.Generator) -> Pixels:
    """Flips half of the images horizontally."""
    import torch  # flips several times faster than numpy

    return torch.from_numpy(pixels).flip(2).numpy() if rng.random() < 0.5 else pixels


def jitter(image: Image.Image, strength: float, rng: np.random.Generator) -> Image.Image:
    """Multiplies brightness, contrast and saturation of an RGB image by a random factor in
    1 +- strength each, in random order (torchvision's ColorJitter)."""
    changes = [ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color]
    for i in rng.permutation(len(changes)):
        factor = rng.uniform(max(0.0, 1 - strength), 1 + strength)
        image = changes[i](image).enhance(factor)
    return image


def normalise(pixels: Tensor) -> Tensor:
    """uint8 [B, 3, h, w] -> float32, normalised with ImageNet's mean and standard deviation."""
    scaled = pixels.float().div_(255)
    for channel, mean, std in zip(scaled.unbind(1), MEAN, STD, strict=True):
        channel.sub_(mean).div_(std)  # Python numbers: nothing is copied to the device
    return scaled
