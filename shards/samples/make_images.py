"""Creates samples/images: grey tiles of 32 x 32 pixels from ten pictures with free licences.

    python -m shards.samples.make_images PICTURES [OUT]    # PICTURES: the folder skimage/data

The class of a tile is its picture. Brightness and contrast are random, so that they do not reveal
the class, and half of the tiles are transposed. The tiles of `train` come from the left three
quarters of the pictures, those of `unseen` from the rest. The same pictures and the same version of
Pillow give the same files.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

LIMIT = 1_500_000  # bytes, over all files
PICTURES = {
    "astronaut": "astronaut.png",
    "brick": "brick.png",
    "camera": "camera.png",
    "cat": "chelsea.png",
    "coffee": "coffee.png",
    "grass": "grass.png",
    "gravel": "gravel.png",
    "hubble": "hubble_deep_field.jpg",
    "retina": "retina.jpg",
    "rocket": "rocket.jpg",
}
SIDE = 32  # pixels
LARGEST = 800  # pixels of a side; larger pictures are scaled to half size
FLAT = 4.0  # standard deviation of grey; tiles with less contrast are left out
TRAINED = 0.75  # share of a picture's width
SPLITS = {
    "train": (200, 16),
    "unseen": (40, 32),
}  # {split: (tiles per class, pixels between tiles)}
LEVELS = 16  # of grey: half a byte per pixel

Grey = npt.NDArray[np.float64]  # [h, w]


def tiles(picture: Grey, first: int, end: int, step: int) -> Iterator[Grey]:
    """The tiles between two columns, without flat ones."""
    for y in range(0, picture.shape[0] - SIDE + 1, step):
        for x in range(first, end - SIDE + 1, step):
            tile = picture[y : y + SIDE, x : x + SIDE]
            if tile.std() >= FLAT:
                yield tile


def finish(tile: Grey, rng: np.random.Generator) -> Image.Image:
    """An image with random brightness and contrast."""
    tile = (tile - tile.mean()) / tile.std() * rng.uniform(25, 55) + rng.uniform(90, 165)
    tile = tile.T if rng.random() < 0.5 else tile
    step = 255 // (LEVELS - 1)
    levels = np.clip(np.round(tile / step), 0, LEVELS - 1) * step
    return Image.fromarray(levels.astype(np.uint8))


def drawn(name: str) -> int:
    """A pseudorandom number for a name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")


def make(source: Path, out: Path) -> int:
    """Writes train/CLASS and unseen/CLASS to `out`; returns the bytes of all files in it."""
    for split in SPLITS:
        shutil.rmtree(out / split, ignore_errors=True)
    for name, file in PICTURES.items():
        image = Image.open(source / file, formats=("PNG", "JPEG")).convert("L")
        if max(image.size) > LARGEST:
            image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
        picture = np.asarray(image, dtype=np.float64)
        cut = int(image.width * TRAINED) // SIDE * SIDE
        for split, (most, step) in SPLITS.items():
            folder = out / split / name
            folder.mkdir(parents=True)
            between = (0, cut) if split == "train" else (cut, image.width)
            found = list(tiles(picture, *between, step))
            order = sorted((drawn(f"{split}/{name}/{i}"), i) for i in range(len(found)))
            for number, (seed, i) in enumerate(order[:most]):
                tile = finish(found[i], np.random.default_rng(seed))
                tile.save(folder / f"{number:03d}.png", optimize=True)
    return sum(file.stat().st_size for file in out.rglob("*") if file.is_file())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path, nargs="?", default=Path(__file__).parent / "images")
    arguments = parser.parse_args()
    size = make(arguments.source, arguments.out)
    assert size <= LIMIT, f"{size} bytes, the limit is {LIMIT}"
    print(f"{size} bytes in {arguments.out}")
