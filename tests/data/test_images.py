"""Images: decoding, crops and augmentation, compared with slow implementations."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from d2v_ds import seeding
from d2v_ds.data import image_files, images
from tests.helpers.pictures import encoded, gradient


def rng(*path: int) -> np.random.Generator:
    return seeding.generator(0, *path)


def smooth(w: int, h: int, seed: int = 0) -> Image.Image:
    """A random image without fine detail."""
    coarse = rng(seed).integers(0, 256, (max(2, h // 8), max(2, w // 8), 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((w, h), Image.Resampling.BICUBIC)


def array(image: Image.Image) -> np.ndarray[Any, Any]:
    return np.asarray(image, dtype=float).transpose(2, 0, 1)


# ------------------------------------------------------------------------------------------- crops


def slow_box(w: int, h: int, scale: tuple[float, float], draw: np.random.Generator) -> images.Box:
    """RandomResizedCrop.get_params as described by torchvision's documentation and code."""
    tries = 0
    while tries < 10:
        tries += 1
        target_area = draw.uniform(scale[0], scale[1]) * (h * w)
        log_ratio = draw.uniform(math.log(3.0 / 4.0), math.log(4.0 / 3.0))
        aspect_ratio = math.exp(log_ratio)
        crop_w = round(math.sqrt(target_area * aspect_ratio))
        crop_h = round(math.sqrt(target_area / aspect_ratio))
        if crop_w > w or crop_h > h or crop_w == 0 or crop_h == 0:
            continue
        i = draw.integers(0, w - crop_w + 1)
        j = draw.integers(0, h - crop_h + 1)
        return int(i), int(j), crop_w, crop_h
    in_ratio = w / h
    if in_ratio < 3.0 / 4.0:
        crop_w, crop_h = w, round(w / (3.0 / 4.0))
    elif in_ratio > 4.0 / 3.0:
        crop_w, crop_h = round(h * (4.0 / 3.0)), h
    else:
        crop_w, crop_h = w, h
    return (w - crop_w) // 2, (h - crop_h) // 2, crop_w, crop_h


@settings(max_examples=200, deadline=None)
@given(
    w=st.integers(2, 700),
    h=st.integers(2, 700),
    low=st.floats(0.01, 1.0),
    high=st.floats(0.01, 1.0),
    seed=st.integers(0, 10**6),
)
def test_boxes_are_those_of_the_slow_implementation(
    w: int, h: int, low: float, high: float, seed: int
) -> None:
    scale = min(low, high), max(low, high)
    box = images.random_box(w, h, scale, rng(seed))
    assert box == slow_box(w, h, scale, rng(seed))
    left, top, across, down = box
    assert 0 <= left <= w - across and 0 <= top <= h - down and across > 0 and down > 0


def test_boxes_are_spread_as_published() -> None:
    """Area, the logarithm of the aspect ratio, and offsets have uniform distributions."""
    boxes = np.array([images.random_box(1000, 1000, (0.2, 0.5), rng(i)) for i in range(4000)])
    left, _, w, h = boxes.T.astype(float)
    shares = [
        (w * h / 1e6 - 0.2) / 0.3,
        (np.log(w / h) - math.log(3 / 4)) / (2 * math.log(4 / 3)),
        left / (1000 - w),
    ]
    for share in shares:
        # Kolmogorov-Smirnov distance from the uniform distribution; p = 0.001 at 1.95 / sqrt(n)
        distance = np.abs(np.sort(share) - np.linspace(0, 1, len(share))).max()
        assert distance < 1.95 / math.sqrt(len(share))


def test_random_crops_take_their_share_of_the_area() -> None:
    """Red and green encode the corners of a crop; areas, aspect ratios and offsets vary."""
    image, areas = gradient(256, 256), []
    for i in range(200):
        crop = images.random_crop(image, 32, (0.25, 0.5), rng(i)).astype(float)
        w = (crop[0, 16, -1] - crop[0, 16, 0]) / 255
        h = (crop[1, -1, 16] - crop[1, 0, 16]) / 255
        areas.append(w * h)
        assert 0.6 < w / h < 1.6
    assert 0.2 < min(areas) < 0.27 and 0.42 < max(areas) < 0.52


def test_a_crop_that_never_fits_falls_back_to_the_centre() -> None:
    wide = gradient(400, 10)  # no crop of its whole area has an aspect ratio of 4 / 3
    crop = images.random_crop(wide, 16, (1.0, 1.0), rng()).astype(float)
    assert crop.shape == (3, 16, 16) and abs(crop[0].mean() - 127.5) < 2


@pytest.mark.parametrize("size", [8, 32, 64, 200])
def test_resizing_matches_pillow(size: int) -> None:
    """Bicubic with antialiasing; at most 2 of 255 levels differ."""
    image, box = smooth(120, 90), (7, 11, 64, 75)
    left, top, w, h = box
    # Pillow's box sees the pixels around it; ours, like torchvision's crop, does not
    theirs = image.crop((left, top, left + w, top + h)).resize(
        (size, size), Image.Resampling.BICUBIC
    )
    difference = np.abs(images.crop(image, box, size) - array(theirs))
    assert difference.max() <= 2 and difference.mean() < 0.2


def test_centre_crop_for_evaluation() -> None:
    image = smooth(500, 300)
    crop = images.centre_crop(image, 224)
    resized = image.resize((427, 256), Image.Resampling.BICUBIC)  # torchvision's Resize(256)
    theirs = array(resized.crop((101, 16, 325, 240)))
    assert crop.shape == (3, 224, 224) and np.abs(crop - theirs).max() <= 2
    crop = images.centre_crop(gradient(512, 256), 224).astype(float)
    assert abs(crop[0, 112].mean() - 127.5) < 1  # the middle of the width
    assert crop[1, 0, 112] > 10 and crop[1, -1, 112] < 245  # 224 of 256


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_large_jpegs_are_decoded_small(mode: str) -> None:
    whole = smooth(1024, 800).convert(mode)
    data = encoded(whole, "JPEG", quality=95)
    image, box = image_files.open_image(data), (100, 40, 640, 600)
    crop = images.crop(image, box, 100)
    assert image.size == (256, 200)  # a quarter of the size; 150 pixels become 100
    slow = images.crop(image_files.decode(data), box, 100)
    assert np.abs(crop.astype(float) - slow).mean() < 3  # the JPEG decoder's filter is not bicubic
    assert np.corrcoef(crop.reshape(-1), slow.reshape(-1))[0, 1] > 0.998
    image = image_files.open_image(data)
    images.crop(image, (0, 0, 199, 199), 100)
    assert image.size == (1024, 800)  # no gain below twice the size


# ----------------------------------------------------------------------------------- augmentation


def test_flips() -> None:
    pixels = array(gradient(8, 8)).astype(np.uint8)
    flips = [images.random_flip(pixels, rng(i)) for i in range(400)]
    assert {flip[0, 0, 0] for flip in flips} == {0, 255}
    assert all((flip[1] == pixels[1]).all() for flip in flips)
    assert 155 < sum(flip[0, 0, 0] == 255 for flip in flips) < 245


def slow_jitter(
    pixels: np.ndarray[Any, Any], strength: float, draw: np.random.Generator
) -> np.ndarray[Any, Any]:
    """ColorJitter as described by torchvision: blends with black, with the mean grey level and with
    the grey image."""

    def grey(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return np.round(0.299 * x[..., 0] + 0.587 * x[..., 1] + 0.114 * x[..., 2])[..., None]

    x = pixels.astype(float)
    for change in draw.permutation(3):
        factor = draw.uniform(max(0.0, 1 - strength), 1 + strength)
        other = [np.zeros_like(x), np.round(grey(x).mean()), grey(x)][change]
        x = np.floor(np.clip(other + factor * (x - other), 0, 255))
    return x


def test_jitter_is_that_of_the_slow_implementation() -> None:
    image, changed = smooth(40, 30), set()
    for i in range(100):
        ours = np.asarray(images.jitter(image, 0.4, rng(i)), dtype=float)
        slow = slow_jitter(np.asarray(image), 0.4, rng(i))
        assert np.abs(ours - slow).max() <= 3, i  # each of the three changes is rounded
        changed.add(ours.tobytes())
    assert len(changed) == 100
    assert np.array_equal(np.asarray(images.jitter(image, 0.0, rng())), np.asarray(image))


def test_normalisation() -> None:
    pixels = torch.from_numpy(np.stack([images.centre_crop(smooth(9, 9, i), 8) for i in range(2)]))
    before = pixels.clone()
    scaled = images.normalise(pixels)
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    assert scaled.dtype == torch.float32 and torch.equal(pixels, before)
    assert torch.equal(scaled, (pixels.float() / 255 - mean) / std)
