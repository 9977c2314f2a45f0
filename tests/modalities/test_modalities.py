"""Modalities: samples in, batches out; what a person can get wrong in data and settings."""

from __future__ import annotations

import dataclasses
import io
from typing import Any

import numpy as np
import pytest

from d2v_ds import seeding
from d2v_ds.errors import UserError
from d2v_ds.modalities import create_modalities
from d2v_ds.modalities.text import Text, TextConfig
from d2v_ds.modalities.vision import Vision, VisionConfig, sincos_2d
from d2v_ds.telemetry.pictures import masked_picture
from tests.helpers import variants
from tests.helpers.pictures import encoded, gradient


def rng(*path: int) -> np.random.Generator:
    return seeding.generator(0, *path)


def npy(ids: Any, kind: Any = np.uint16) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.asarray(ids, dtype=kind))
    return buffer.getvalue()


# ------------------------------------------------------------------------------------- vision


def vision(**settings: Any) -> Vision:
    return Vision(VisionConfig(**({"image_size": 32, "patch_size": 8, "views": 2} | settings)))


def test_images_are_augmented_by_their_generator_alone() -> None:
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


def test_beit_masks_differ_in_number_and_are_counted_when_drawn() -> None:
    [modality] = create_modalities(
        {"vision": {"masked": "replaced", "views": 1, "mask": {"kind": "beit"}}}
    ).values()
    assert modality.masked_tokens(1) is None
    samples = [np.zeros((3, 224, 224), np.uint8)] * 12
    batch = modality.collate(samples, [rng(i) for i in range(12)], 0)
    counts = (~batch.seen).sum(1).tolist()
    assert len(set(counts)) > 1 and max(counts) <= 120 and sum(counts) == len(batch.masked)
    assert batch.visible is None


def test_the_picture_of_an_image_stands_upright() -> None:
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
    assert grey[0, 0] < grey[-1, -1]  # dark above left, bright below right


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
        ({"image_size": 32, "mask": {"kind": "beit"}}, "mask.patches=120 is not below the 4"),
        ({"positions": "relative", "extra_tokens": 0}, "takes extra_tokens=1"),
        ({"cls_weight": 1.0, "extra_tokens": 0}, "cls_weight=1.0 needs extra_tokens"),
        ({"crop_scale": [0.5, 0.2]}, "crop_scale=(0.5, 0.2) must rise within"),
        ({"jitter": 2.0}, "jitter=2.0 does not lie in"),
        ({"mask": {"prob": 1.0}}, "prob=1.0 does not lie between 0 and 1"),
        ({"masked": "dropped"}, "expected one of removed, replaced"),
        ({"views": 0}, "views=0 must be at least 1"),
    ],
)
def test_wrong_settings_of_vision_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        create_modalities({"vision": settings})
    assert str(caught.value).startswith("modality.vision") and message in str(caught.value)


# --------------------------------------------------------------------------------------- text


def text(**settings: Any) -> Text:
    small = {"vocab_size": 50, "mask_id": 49, "max_tokens": 16, "views": 2}
    return Text(TextConfig(**(small | settings)))


@pytest.mark.parametrize("kind", [np.uint16, np.uint32])
def test_blocks_of_ids_are_read(kind: Any) -> None:
    modality = text()
    ids = np.arange(4, 34)
    assert modality.decode({"npy": npy(ids, kind)}, None).tolist() == list(range(4, 20))
    pieces = {int(modality.decode({"npy": npy(ids, kind)}, rng(i))[0]) for i in range(200)}
    assert pieces == set(range(4, 19))  # every place where 16 of 30 may begin
    assert modality.crop(1) == 0 and modality.crop(30) == 16 and modality.cost(9) == 9
    bag = modality.baseline(np.array([4, 4, 5, 6]))
    assert bag.shape == (50,) and bag[4] == 0.5 and bag.sum() == 1


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"nothing", "cannot be read as a .npy array"),
        (npy([5, 6])[:-1], "cannot be read as a .npy array"),
        (npy([5, 6], np.int64), "holds int64 of shape (2,)"),
        (npy([[5, 6]]), "holds uint16 of shape (1, 2)"),
        (npy([5, 50]), "has token id 50, modality.text.vocab_size is 50"),
    ],
)
def test_blocks_that_are_none_are_told(data: bytes, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        text().decode({"npy": data}, None)
    assert message in str(caught.value)


def test_a_batch_of_text_of_two() -> None:
    modality = text()
    samples = [np.arange(4, 20), np.arange(4, 14)]
    batch = modality.collate(samples, [rng(0), rng(1)], 0)
    assert batch.inputs[1].tolist() == [*range(4, 14), *[1] * 6]
    assert batch.valid is not None and batch.valid.sum(1).tolist() == [16, 10]
    assert batch.corrupted is None and batch.visible is not None
    planned = [modality.masked_tokens(n) for n in (16, 10)]
    assert len(batch.masked) == sum(n or 0 for n in planned) == 2 * (16 - 8) + 2 * (10 - 5)


def test_a_batch_of_text_of_one_with_80_10_10() -> None:
    spans = {"kind": "spans", "prob": 0.5, "length": 1, "random_prob": 0.1, "keep_prob": 0.1}
    [modality] = create_modalities(
        {
            "text": {
                "vocab_size": 5000,
                "mask_id": 4999,
                "views": 2,
                "masked": "replaced",
                "mask": spans,
            }
        }
    ).values()
    assert modality.masked_tokens(512) is None
    samples = [np.full(512, 7)] * 20
    batch = modality.collate(samples, [rng(i) for i in range(20)], 0)
    assert batch.corrupted is not None and batch.corrupted.shape == (40, 512)
    assert (batch.inputs == 7).all() and (batch.corrupted[batch.seen] == 7).all()
    masked = batch.corrupted.flatten()[batch.masked].numpy()
    shares = [
        np.mean(masked == 4999),
        np.mean(masked == 7),
        np.mean((masked != 4999) & (masked != 7)),
    ]
    assert np.allclose(shares, [0.8, 0.1, 0.1], atol=4.5 * np.sqrt(0.16 / len(masked)))
    assert not np.isin(masked, range(4)).any()
    # Views of a sample are corrupted each in its own way.
    assert not np.array_equal(batch.corrupted[0], batch.corrupted[1])


def test_the_picture_of_text_is_as_wide_as_it_is_long() -> None:
    modality = text()
    batch = modality.collate([np.arange(4, 14)], [rng()], 0)
    shown, masked = modality.picture(batch)
    assert shown.shape[0] == 10 and masked.shape == (10,)
    assert masked_picture(shown, masked).shape[2] == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vocab_size": 100}, "mask_id=50264 is no id of vocab_size=100"),
        ({"max_tokens": 1}, "max_tokens=1 must be at least 2"),
        ({"mask": {"random_prob": 0.6, "keep_prob": 0.5}}, "whose sum is at most 1"),
        ({"mask": {"length": 0}}, "length=0 must be at least 1"),
        ({"masked": "replaced", "text_teacher": "masked"}, "takes views=1, got 8"),
        ({"specials": 50_265}, "specials=50265 leaves no id"),
    ],
)
def test_wrong_settings_of_text_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        create_modalities({"text": settings})
    assert str(caught.value).startswith("modality.text") and message in str(caught.value)


# ------------------------------------------------------------------------------ all of them


@pytest.mark.parametrize("variant", variants.VARIANTS)
def test_batches_travel(variant: str) -> None:
    """Every tensor of a batch goes along to another device, and views stay side by side."""
    task = variants.build(variant)
    batch = variants.batch_of(task, 20, 40)
    moved = batch.to(batch.inputs.device)
    for field in dataclasses.fields(batch):
        value, other = getattr(batch, field.name), getattr(moved, field.name)
        assert value is other or (value == other).all()
    B, R = len(batch.inputs), len(batch.seen)
    assert R == B * batch.views
