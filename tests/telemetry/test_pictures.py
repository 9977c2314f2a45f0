"""Pictures for TensorBoard."""

from __future__ import annotations

import numpy as np

from d2v_ds.telemetry.pictures import masked_picture


def test_masked_picture_shades_the_masked_frames() -> None:
    log_mel = np.random.default_rng(0).normal(size=(101, 40)).astype(np.float32)
    mask = np.zeros(50, dtype=bool)
    mask[10:20] = True
    plain, picture = (
        masked_picture(log_mel, np.zeros(50, dtype=bool)),
        masked_picture(log_mel, mask),
    )
    assert picture.shape == (160, 404, 3) and picture.dtype == np.uint8
    changed = (plain != picture).any(axis=(0, 2)).reshape(101, 4).all(axis=1)  # by frame
    expected = np.array([mask[i * 50 // 101] for i in range(101)])
    assert (changed == expected).all()
    assert picture.reshape(160, 101, 4, 3)[:, expected].std() < plain.std() / 2


def test_masked_picture_has_low_frequencies_at_the_bottom_and_loud_is_bright() -> None:
    log_mel = np.zeros((20, 10))
    log_mel[:, :2] = 5.0  # all the energy in the two lowest bands
    picture = masked_picture(log_mel, np.zeros(10, dtype=bool)).astype(int).sum(axis=2)
    assert picture[-1].min() > picture[0].max()


def test_masked_picture_of_silence() -> None:
    assert masked_picture(np.zeros((4, 3)), np.ones(2, dtype=bool)).shape == (12, 16, 3)
