"""One image: decoding, and what training and evaluation do to it.

    bytes -> decode -> RGB --jitter, random_flip, random_crop, or centre_crop--> RGB
        --normalise--> float32 [3, h, w]

Pillow's images in between; h, w pixels. Randomness comes from the generator alone, so it does not
depend on the process. Anything that cannot be used raises ValueError without the file's name.
"""

from __future__ import annotations

import io
import math
import warnings

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageEnhance

Pixels = npt.NDArray[np.float32]

MEAN = np.array([0.485, 0.456, 0.406], np.float32)  # of ImageNet's pixels in [0, 1], by channel
STD = np.array([0.229, 0.224, 0.225], np.float32)
ATTEMPTS = 10  # to place a crop of the wanted area and aspect ratio
ASPECT = (3 / 4, 4 / 3)
RESIZE = 256 / 224  # the short side before a centre crop, in sizes of the crop


def decode(data: bytes) -> Image.Image:
    """The image as RGB. Raises ValueError when it is none, damaged, or too large to be one."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            warnings.simplefilter("ignore", UserWarning)  # of odd metadata
            return Image.open(io.BytesIO(data)).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot be read as an image ({error})") from None
    except Image.DecompressionBombWarning as error:
        raise ValueError(f"has too many pixels ({error})") from None


def random_crop(
    image: Image.Image, size: int, scale: tuple[float, float], rng: np.random.Generator
) -> Image.Image:
    """A crop of a random share of the area in `scale` and a random aspect ratio, resized (bicubic)
    to size x size: torchvision's RandomResizedCrop, as MAE, BEiT and data2vec train with."""
    for _ in range(ATTEMPTS):
        area = image.width * image.height * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(math.log(ASPECT[0]), math.log(ASPECT[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= image.width and 0 < h <= image.height:
            left = int(rng.integers(image.width - w + 1))
            top = int(rng.integers(image.height - h + 1))
            box = (left, top, left + w, top + h)
            return image.resize((size, size), Image.Resampling.BICUBIC, box)
    ratio = min(max(image.width / image.height, ASPECT[0]), ASPECT[1])
    w = min(image.width, round(image.height * ratio))
    h = min(image.height, round(image.width / ratio))
    left, top = (image.width - w) // 2, (image.height - h) // 2
    return image.resize((size, size), Image.Resampling.BICUBIC, (left, top, left + w, top + h))


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """The middle size x size after resizing the short side (bicubic) to 256 / 224 of size."""
    factor = round(size * RESIZE) / min(image.size)
    w, h = max(size, round(image.width * factor)), max(size, round(image.height * factor))
    left, top = (w - size) // 2, (h - size) // 2
    resized = image.resize((w, h), Image.Resampling.BICUBIC)
    return resized.crop((left, top, left + size, top + size))


def random_flip(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Left and right change places in every second image."""
    if rng.random() < 0.5:
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return image


def jitter(image: Image.Image, strength: float, rng: np.random.Generator) -> Image.Image:
    """Brightness, contrast and saturation times a random factor in 1 +- strength, in random order
    (torchvision's ColorJitter)."""
    changes = [ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color]
    for i in rng.permutation(len(changes)):
        factor = rng.uniform(max(0.0, 1 - strength), 1 + strength)
        image = changes[i](image).enhance(factor)
    return image


def normalise(image: Image.Image) -> Pixels:
    """[3, h, w] with ImageNet's mean and standard deviation taken out."""
    pixels = np.asarray(image, dtype=np.float32) / 255.0
    scaled = (pixels - MEAN) / STD
    return np.ascontiguousarray(scaled.transpose(2, 0, 1), dtype=np.float32)


def denormalise(pixels: Pixels) -> Pixels:
    """[3, h, w] as `normalise` made it -> [h, w, 3] in [0, 1]."""
    shown = pixels.transpose(1, 2, 0) * STD + MEAN
    clipped: Pixels = np.clip(shown, 0.0, 1.0)
    return clipped
