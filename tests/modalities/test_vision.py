"""Vision: images in, batches out; errors in settings."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from d2v_ds import seeding
from d2v_ds.errors import UserError
from d2v_ds.modalities import create_modalities
from d2v_ds.modalities.vision import Vision, VisionConfig, sincos_2d
from d2v_ds.telemetry.pictures import masked_picture
from tests.helpers.pictures import encoded, gradient


def rng(*path: int) -> np.random.Generator:
    return seeding.generator(0, *path)


def vision(**settings: Any) -> Vision:
    return Vision(VisionConfig(**({"image_size": 32, "patch_size": 8, "views": 2} | settings)))


def test_augmentation_depends_only_on_the_generator() -> None:
    modality, sample = vision(jitter=0.4), {"png": encoded(gradient(100, 60)), "json": b"{}"}
    once, again = modality.decode(sample, rng(1)), modality.decode(sample, rng(1))
    assert once.shape == (3, 32, 32) and once.dtype == np.uint8
    assert np.array_equal(once, again)
    assert not np.array_equal(once, modality.decode(sample, rng(2)))
    whole = modality.decode(sample, None)
    assert np.array_equal(whole, modality.decode(sample, None)) and whole.shape == (3, 32, 32)
    assert modality.baseline(whole).shape == (3 * 32 * 32,)


def test_a_batch_of_images() -> None:
    modality = vision()
    samples = [np.full((3, 32, 32), i, np.uint8) for i in range(3)]
    batch = modality.collate(samples, [rng(i) for i in range(3)], 5)
    assert batch.index == 5 and batch.views == 2 and batch.valid is None and not batch.ragged
    assert batch.inputs[:, 0, 0, 0].tolist() == [0, 1, 2] and batch.seen.shape == (6, 16)
    assert len(batch.masked) == 3 * (modality.masked_tokens(1) or 0) == 6 * 13
    assert modality.crop(10**6) == 32 * 32 and modality.cost(10**6) == 1


def test_the_number_of_beit_masks_is_known_only_when_they_are_drawn() -> None:
    [modality] = create_modalities(
        {"vision": {"masked": "replaced", "views": 1, "mask": {"kind": "beit"}}}
    ).values()
    assert modality.masked_tokens(1) is None
    samples = [np.zeros((3, 224, 224), np.uint8)] * 12
    batch = modality.collate(samples, [rng(i) for i in range(12)], 0)
    counts = (~batch.seen).sum(1).tolist()
    assert len(set(counts)) > 1 and max(counts) <= 120 and sum(counts) == len(batch.masked)
    assert batch.visible is None


def test_the_picture_of_an_image_is_upright() -> None:
    modality = vision()
    pixels = np.asarray(gradient(32, 32)).transpose(2, 0, 1)
    batch = modality.collate([pixels], [rng()], 0)
    shown, masked = modality.picture(batch)
    assert shown.shape == (32, 32) and masked.shape == (4, 4)
    picture = masked_picture(shown, masked)
    assert picture.shape[2] == 3
    seen = batch.seen[0].numpy().reshape(4, 4)
    side = picture.shape[0] // 4
    plain = masked_picture(shown, np.zeros_like(masked))
    changed = (picture != plain).any(2).reshape(4, side, 4, side).any((1, 3))
    assert np.array_equal(changed, ~seen)
    grey = plain.astype(float).sum(2)
    assert grey[0, 0] < grey[-1, -1]  # dark at the top left, bright at the bottom right


def test_fixed_positions() -> None:
    table = sincos_2d((2, 3), 8)
    assert table.shape == (6, 8)
    row, column, frequency = 1, 2, 0.01
    expected = [np.sin(column), np.sin(column * frequency), np.cos(column)]
    assert table[row * 3 + column, :3].tolist() == pytest.approx(expected, rel=1e-6)
    assert table[row * 3 + column, 4].item() == pytest.approx(np.sin(row), rel=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": 30}, "image_size=30 is not a multiple of patch_size=16"),
        ({"image_size": 32, "mask": {"kind": "beit"}}, "mask.patches=120 must be below 4,"),
        (
            {"positions": "relative", "extra_tokens": 0},
            "requires extra_tokens=1, got 0",
        ),
        ({"cls_weight": 1.0, "extra_tokens": 0}, "cls_weight=1.0 needs extra_tokens"),
        ({"crop_scale": [0.5, 0.2]}, "crop_scale=(0.5, 0.2) must be [min, max]"),
        ({"jitter": 2.0}, "jitter: must be in [0, 1], got 2.0"),
        ({"mask": {"prob": 1.0}}, "prob: must be in (0, 1), got 1.0"),
        ({"patch_size": 0}, "patch_size: must be at least 1, got 0"),
        ({"masked": "dropped"}, "expected one of removed, replaced"),
        ({"views": 0}, "views: must be at least 1, got 0"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        create_modalities({"vision": settings})
    assert str(caught.value).startswith("modality.vision") and message in str(caught.value)
