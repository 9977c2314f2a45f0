"""mixup, CutMix and random erasing of labelled images."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d2v_ds.config.finetuning import FineTuning
from d2v_ds.data import images
from d2v_ds.finetune.mixing import ERASED_AREA, Mixing, cut_and_paste, erased
from tests.helpers.labelled import batch_of, build, reader, sample

B, SIDE = 4, 24


def mixing(**changes: Any) -> Mixing:
    return Mixing.of(FineTuning(**changes))


def batch() -> tuple[Any, Any]:
    """Images of one shade each, and one-hot labels."""
    shades = np.array([0, 40, 200, 255], dtype=np.uint8)
    pixels = np.broadcast_to(shades[:, None, None, None], (B, 3, SIDE, SIDE)).copy()
    return pixels, np.eye(B, dtype=np.float32)


@given(st.integers(0, 10_000), st.sampled_from(["mixup", "cutmix", "both"]))
@settings(max_examples=60, deadline=None)
def test_pixels_and_labels_have_the_same_shares(seed: int, kind: str) -> None:
    alphas = {"mixup": 0.8 * (kind != "cutmix"), "cutmix": 1.0 * (kind != "mixup")}
    pixels, labels = batch()
    mixed, shared = mixing(**alphas).mix(pixels, labels, np.random.default_rng(seed))
    assert mixed.dtype == np.uint8 and mixed.shape == pixels.shape
    assert shared.dtype == np.float32 and shared.sum(1) == pytest.approx(np.ones(B))
    share = shared.diagonal()
    assert share == pytest.approx(np.full(B, share[0]))
    assert shared[:, ::-1].diagonal() == pytest.approx(1 - share)
    for own, other, image in zip(pixels, pixels[::-1], mixed, strict=True):
        if len(np.unique(image)) == 1:  # mixup; or CutMix of all or of nothing
            expected = share[0] * own[0, 0, 0] + (1 - share[0]) * other[0, 0, 0]
            assert abs(float(image[0, 0, 0]) - expected) <= 0.5 + 1e-3
        else:  # CutMix: the exact area
            assert (image == own).mean() == pytest.approx(share[0], abs=1e-6)
            assert set(np.unique(image)) == {own[0, 0, 0], other[0, 0, 0]}


def test_the_mean_shares_are_those_of_the_distributions() -> None:
    """Beta(alpha, alpha) has the mean 1/2; a rectangle at the border loses area (0.7 for 1)."""
    pixels, labels = batch()
    for changes, low, high in (({"mixup": 0.8}, 0.45, 0.55), ({"cutmix": 1.0}, 0.6, 0.8)):
        rng = np.random.default_rng(0)
        shares = [mixing(**changes).mix(pixels, labels, rng)[1][0, 0] for _ in range(500)]
        assert low < np.mean(shares) < high, changes


def test_probabilities_of_mixing() -> None:
    pixels, labels = batch()
    rng = np.random.default_rng(0)
    settings_ = {"mixup": 0.8, "cutmix": 1.0, "mix_prob": 0.6, "mix_switch": 0.25}
    kinds = {"none": 0, "cutmix": 0, "mixup": 0}
    for _ in range(1000):
        mixed, shared = mixing(**settings_).mix(pixels, labels, rng)
        if (shared == labels).all():
            kinds["none"] += 1
        else:
            kinds["mixup" if len(np.unique(mixed[0])) == 1 else "cutmix"] += 1
    assert kinds["none"] == pytest.approx(400, abs=60)
    assert kinds["mixup"] == pytest.approx(450, abs=60), kinds
    assert kinds["cutmix"] == pytest.approx(150, abs=60), kinds
    assert not mixing().mixes and mixing(cutmix=0.1).mixes


def test_a_sample_without_a_label_stays_one() -> None:
    pixels, labels = batch()
    labels[1] = 0
    _, shared = mixing(mixup=0.8).mix(pixels, labels, np.random.default_rng(1))
    assert shared.sum(1).tolist() == pytest.approx([1, 0, 0, 1])  # also its partner, number 2


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99, 1.0])
def test_cut_and_paste_keeps_the_images(share: float) -> None:
    pixels, _ = batch()
    before = pixels.copy()
    for seed in range(20):
        mixed, left = cut_and_paste(pixels, share, np.random.default_rng(seed))
        assert 0 <= left <= 1 and (left == 1) == (mixed == before).all()
    assert (pixels == before).all(), "the input must not change"


# ----------------------------------------------------------------------------------- random erasing


@given(st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_erasing_replaces_one_rectangle(seed: int) -> None:
    pixels = np.full((3, 40, 50), 7, dtype=np.uint8)
    found = erased(pixels, np.random.default_rng(seed))
    assert found.dtype == np.uint8 and (pixels == 7).all()
    changed = (found != 7).any(0)
    rows, columns = changed.any(1).nonzero()[0], changed.any(0).nonzero()[0]
    area = (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
    low, high = ERASED_AREA
    assert low * 0.8 < area / (40 * 50) < high * 1.2
    assert changed.sum() > 0.9 * area  # the noise is rarely 7


def test_the_noise_has_the_statistics_of_images() -> None:
    rng = np.random.default_rng(0)
    noise = []
    for _ in range(200):
        found = erased(np.full((3, 64, 64), 255, dtype=np.uint8), rng)
        noise.append(found[:, (found != 255).all(0)].astype(float))
    values = np.concatenate(noise, axis=1)
    assert values.mean(1) == pytest.approx(255 * np.array(images.MEAN), abs=8)
    assert values.std(1) == pytest.approx(255 * np.array(images.STD), abs=8)


# ------------------------------------------------------------------------------------ in the loader


def test_batches_of_the_loader_are_mixed_in_training_and_reproducible() -> None:
    changes = {"mixup": 0.8, "cutmix": 1.0, "erase": 1.0, "augment": "rand"}
    task = build("v2_vision", **changes)
    found = [sample("v2_vision", 0, label, i) for i, label in enumerate(("up", "left", "right"))]
    one, again = (batch_of(reader(task), found) for _ in range(2))
    assert one.inputs.equal(again.inputs) and one.labels.equal(again.labels)
    assert one.inputs.dtype == reader(task).unmasked([_pixels()]).inputs.dtype
    assert one.labels.sum(1).tolist() == pytest.approx([1, 1, 1])
    assert ((one.labels > 0) & (one.labels < 1)).any()
    held_out = batch_of(reader(task, training=False), found)
    assert ((held_out.labels == 0) | (held_out.labels == 1)).all()
    assert not held_out.inputs.equal(one.inputs)


def _pixels() -> Any:
    return np.zeros((3, 32, 32), dtype=np.uint8)


def test_augmentation_depends_on_its_settings() -> None:
    pixels = np.full((3, 20, 20), 9, dtype=np.uint8)
    plain = mixing().augment(pixels, np.random.default_rng(0))
    assert plain is pixels
    always = dataclasses.replace(mixing(), erase=1.0).augment(pixels, np.random.default_rng(0))
    assert (always != pixels).any()
