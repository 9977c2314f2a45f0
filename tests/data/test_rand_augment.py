"""RandAugment: each operation, and their random choice."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

from d2v_ds.data import rand_augment as module
from d2v_ds.data.rand_augment import FILL, TABLE, rand_augment

SIDE = 32


def picture() -> Any:
    """A photograph-like image [3, h, w] of medium contrast."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:SIDE, :SIDE] / SIDE
    base = np.stack([60 + 90 * rows, 80 + 90 * columns, 150 - 90 * rows * columns])
    pixels: Any = np.clip(base + rng.normal(0, 8, base.shape), 0, 255).astype(np.uint8)
    return pixels


def image() -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(picture().transpose(1, 2, 0)))


def apply(name: str, level: float = 0.9, sign: float = 1.0) -> Any:
    return np.asarray(TABLE[name](image(), level, sign)).astype(int)


ORIGINAL = np.asarray(image()).astype(int)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("name", TABLE)
def test_every_operation_changes_the_image_and_keeps_its_size(name: str, sign: float) -> None:
    found = TABLE[name](image(), 0.9, sign)
    assert found.size == (SIDE, SIDE) and found.mode == "RGB"
    assert 0.005 < np.abs(np.asarray(found).astype(int) - ORIGINAL).mean() / 255 < 0.9
    assert found.tobytes() == TABLE[name](image(), 0.9, sign).tobytes()


def test_operations_by_their_formulas() -> None:
    """At level 0.9 of 1, as in timm's increasing operations."""
    assert (apply("invert") == 255 - ORIGINAL).all()
    assert (apply("posterize") == (ORIGINAL & 0b1000_0000)).all()  # 4 - int(3.6) = 1 bit
    solarized = np.where(ORIGINAL < 256 - 230, ORIGINAL, 255 - ORIGINAL)
    assert (apply("solarize") == solarized).all()
    added = np.where(ORIGINAL < 128, np.minimum(255, ORIGINAL + 99), ORIGINAL)
    assert (apply("solarize_add") == added).all()
    for sign, factor in ((1, 1.81), (-1, 0.19)):
        expected = np.clip(ORIGINAL * factor, 0, 255)
        assert np.abs(apply("brightness", 0.9, sign) - expected).max() <= 1
    assert (apply("posterize", 1.0) == (ORIGINAL & 0b1000_0000)).all(), "one bit is the least"


def test_shifts_move_by_a_share_of_the_side() -> None:
    moved = round(0.45 * 0.5 * SIDE)
    for name, axis in (("translate_x", 1), ("translate_y", 0)):
        found = np.moveaxis(apply(name, 0.5, 1.0), axis, 0)
        original = np.moveaxis(ORIGINAL, axis, 0)
        assert np.abs(found[: SIDE - moved - 1] - original[moved:-1]).mean() < 6
        assert (found[-1] == FILL).all()


def test_rotation_and_shear_fill_the_corners() -> None:
    for name in ("rotate", "shear_x", "shear_y"):
        corners = [apply(name)[y, x] for y in (0, -1) for x in (0, -1)]
        assert any((corner == FILL).all() for corner in corners), name


# --------------------------------------------------------------------------------------- the choice


def test_the_result_is_uint8_and_reproducible() -> None:
    before = picture()
    for seed in range(40):
        one, again = (rand_augment(before, np.random.default_rng(seed)) for _ in range(2))
        assert one.dtype == np.uint8 and one.shape == before.shape and one.flags.c_contiguous
        assert (one == again).all()
    assert (before == picture()).all(), "the input must not change"


def test_two_operations_each_with_probability_one_half(monkeypatch: pytest.MonkeyPatch) -> None:
    applied: list[tuple[str, float, float]] = []

    def record(name: str) -> Any:
        def operation(found: Image.Image, level: float, sign: float) -> Image.Image:
            applied.append((name, level, sign))
            return found

        return operation

    monkeypatch.setattr(module, "TABLE", {name: record(name) for name in TABLE})
    rng, calls = np.random.default_rng(0), 3000
    numbers = []
    for _ in range(calls):
        before = len(applied)
        rand_augment(picture(), rng)
        numbers.append(len(applied) - before)
    assert np.bincount(numbers) / calls == pytest.approx([0.25, 0.5, 0.25], abs=0.03)
    names = [name for name, _, _ in applied]
    for name in TABLE:
        assert names.count(name) / len(names) == pytest.approx(1 / 15, abs=0.015)
    levels = np.array([level for _, level, _ in applied])
    assert levels.max() <= 1 and levels.mean() == pytest.approx(0.9, abs=0.01)
    assert levels.std() == pytest.approx(0.05, abs=0.01)
    assert np.mean([sign for _, _, sign in applied]) == pytest.approx(0, abs=0.06)
    assert len(TABLE) == 15
