"""RandAugment (Cubuk et al. 2020): random operations of about the same strength on one image.

The operations and their ranges are those of timm's rand-m9-mstd0.5-inc1, which the published
fine-tuning of data2vec uses: two of fifteen operations, each applied with probability 1/2, at a
magnitude from N(9, 0.5) of 10.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from d2v_ds.data.images import MEAN, Pixels

OPERATIONS = 2
APPLIED = 0.5  # the probability of each of them
MAGNITUDE, MAGNITUDE_STD, MOST = 9.0, 0.5, 10.0
FILL = tuple(round(255 * mean) for mean in MEAN)  # what appears beyond the border

Operation = Callable[[Image.Image, float, float], Image.Image]


def rand_augment(pixels: Pixels, rng: np.random.Generator) -> Pixels:
    """uint8 [3, h, w] -> the same shape."""
    image = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    names = list(TABLE)
    for choice in rng.choice(len(names), OPERATIONS):
        level = np.clip(rng.normal(MAGNITUDE, MAGNITUDE_STD), 0, MOST) / MOST
        sign = 1.0 if rng.random() < 0.5 else -1.0
        if rng.random() < APPLIED:
            image = TABLE[names[choice]](image, float(level), sign)
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def _affine(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    return image.transform(
        image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor=FILL
    )


def _enhance(kind: Callable[[Image.Image], ImageEnhance._Enhance]) -> Operation:
    return lambda image, level, sign: kind(image).enhance(1 + 0.9 * level * sign)


def _add_below(image: Image.Image, added: int) -> Image.Image:
    """Adds to pixels below 128."""
    return image.point([min(255, v + added) if v < 128 else v for v in range(256)] * 3)


TABLE: dict[str, Operation] = {
    "auto_contrast": lambda image, level, sign: ImageOps.autocontrast(image),
    "equalize": lambda image, level, sign: ImageOps.equalize(image),
    "invert": lambda image, level, sign: ImageOps.invert(image),
    "rotate": lambda image, level, sign: image.rotate(
        30 * level * sign, Image.Resampling.BICUBIC, fillcolor=FILL
    ),
    "posterize": lambda image, level, sign: ImageOps.posterize(image, max(1, 4 - int(4 * level))),
    "solarize": lambda image, level, sign: ImageOps.solarize(image, 256 - int(256 * level)),
    "solarize_add": lambda image, level, sign: _add_below(image, int(110 * level)),
    "colour": _enhance(ImageEnhance.Color),
    "contrast": _enhance(ImageEnhance.Contrast),
    "brightness": _enhance(ImageEnhance.Brightness),
    "sharpness": _enhance(ImageEnhance.Sharpness),
    "shear_x": lambda image, level, sign: _affine(image, (1, 0.3 * level * sign, 0, 0, 1, 0)),
    "shear_y": lambda image, level, sign: _affine(image, (1, 0, 0, 0.3 * level * sign, 1, 0)),
    "translate_x": lambda image, level, sign: _affine(
        image, (1, 0, 0.45 * level * sign * image.width, 0, 1, 0)
    ),
    "translate_y": lambda image, level, sign: _affine(
        image, (1, 0, 0, 0, 1, 0.45 * level * sign * image.height)
    ),
}
