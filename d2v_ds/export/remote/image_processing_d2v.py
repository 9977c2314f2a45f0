"""Images as d2v-ds decodes them without augmentation: the shorter side resized to 256 / 224 of the
model's size (bicubic, with antialiasing), the centre cropped, ImageNet's mean and deviation.

torch resizes, as in pre-training; Pillow's results differ by up to two of 256 levels. A JPEG that
is not loaded yet is decoded no larger than needed, which differs more.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from transformers import BaseImageProcessor, BatchFeature


class D2vImageProcessor(BaseImageProcessor):
    """size: the side of the result; shortest_edge: the shorter side before the crop."""

    model_input_names = ("pixel_values",)

    def __init__(
        self,
        crop_size: Any = None,
        size: Any = None,
        image_mean: Sequence[float] = (0.485, 0.456, 0.406),
        image_std: Sequence[float] = (0.229, 0.224, 0.225),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.crop_size = dict(crop_size or {"height": 224, "width": 224})
        self.size = dict(size or {"shortest_edge": 256})
        self.image_mean, self.image_std = list(image_mean), list(image_std)

    def __call__(self, images: Any, return_tensors: str | None = None, **_: Any) -> BatchFeature:
        return self.preprocess(images, return_tensors=return_tensors)

    def preprocess(self, images: Any, return_tensors: str | None = None, **_: Any) -> BatchFeature:
        """images: one or several of: a Pillow image, uint8 [h, w, 3] as array or tensor. Returns
        pixel_values [B, 3, size, size]."""
        if not isinstance(images, list | tuple):
            images = [images]
        pixels = torch.stack([self.cropped(as_image(image)) for image in images]).float() / 255
        mean, std = (torch.tensor(x)[:, None, None] for x in (self.image_mean, self.image_std))
        values = (pixels - mean) / std
        return BatchFeature({"pixel_values": list(values.numpy())}, tensor_type=return_tensors)

    def cropped(self, image: Image.Image) -> Tensor:
        """uint8 [3, size, size], of the upright image."""
        if image.mode[0] in "IF":
            raise ValueError(
                f"mode {image.mode}: expected 8 bits per channel; scale the image first"
            )
        side = self.crop_size["height"]
        factor = self.size["shortest_edge"] / min(image.size)
        w, h = (max(side, round(n * factor)) for n in image.size)
        if image.format == "JPEG" and image.width >= 2 * w and image.height >= 2 * h:
            image.draft("RGB" if image.mode == "RGB" else None, (w, h))
        upright = ImageOps.exif_transpose(image)
        if upright.size != image.size:
            w, h = h, w
        rgb = torch.from_numpy(np.array(on_white(upright))).permute(2, 0, 1)[None]
        if rgb.shape[2:] != (h, w):
            # Memory order as in pre-training, because torch's result depends on it.
            rgb = rgb.contiguous(memory_format=torch.channels_last)
            rgb = torch.nn.functional.interpolate(rgb, (h, w), mode="bicubic", antialias=True)
        left, top = (w - side) // 2, (h - side) // 2
        return rgb[0, :, top : top + side, left : left + side]


def on_white(image: Image.Image) -> Image.Image:
    """RGB, with white behind transparent pixels."""
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def as_image(image: Any) -> Image.Image:
    """A Pillow image. One that is opened but not loaded is opened again, because decoding it at a
    smaller size would change the caller's image."""
    if not isinstance(image, Image.Image):
        return Image.fromarray(np.asarray(image))
    file = getattr(image, "fp", None)
    if image.format != "JPEG" or file is None or not getattr(image, "tile", None):
        return image
    file.seek(0)
    return Image.open(io.BytesIO(file.read()), formats=("JPEG",))
