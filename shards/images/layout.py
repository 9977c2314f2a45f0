"""The base class of all image layouts, and the options that they depend on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from shards.layout import Layout

EXTENSIONS = (
    *(".jpg", ".jpeg", ".png", ".webp"),
    *(".bmp", ".ppm", ".pgm", ".tif", ".tiff"),  # converted to png
)


@dataclass(frozen=True)
class ImageOptions:
    """Options of d2v-shards images that layouts depend on."""

    image_key: str = "image"
    label_key: str = "label"


@dataclass(frozen=True)
class ImageLayout(Layout[ImageOptions, bytes], abstract=True):
    """An item holds an encoded image; its column "label", if it has one, is the class."""

    uses: ClassVar[tuple[str, ...]] = ()
    """Names of the ImageOptions that determine what this layout reads."""

    classes: tuple[str, ...] = ()
    """Sorted, or in the order that the corpus defines; (): unknown."""
