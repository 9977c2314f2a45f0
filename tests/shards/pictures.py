"""Small images for the tests of this folder."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image


def picture(kind: str = "PNG", size: tuple[int, int] = (20, 12), seed: int = 0) -> bytes:
    """An encoded image of random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()
