"""Rates without a small ratio; tests of the usual ones are in test_audio.py."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from d2v_ds.data import resampling
from d2v_ds.data.resampling import resample

ODD = [(22_254, 16_000), (11_127, 16_000), (15_991, 16_000), (44_101, 16_000), (16_000, 15_991)]


@pytest.mark.parametrize("old, new", ODD)
def test_odd_rates(old: int, new: int) -> None:
    frequency, n = 0.4 * min(old, new), old // 2
    x = np.sin(2 * np.pi * frequency * np.arange(n) / old).astype(np.float32)
    y = resample(x, old, new)
    assert y.dtype == np.float32 and len(y) == -(-n * new // old)
    expected = np.sin(2 * np.pi * frequency * np.arange(len(y)) / new)
    assert abs(y - expected)[500:-500].max() < 1e-3


@pytest.mark.parametrize("old, new", [(44_100, 16_000), (8000, 16_000), (48_000, 16_000)])
def test_rows_and_matrix_agree(old: int, new: int) -> None:
    x = np.random.default_rng(0).standard_normal(9001).astype(np.float32)
    length = -(-len(x) * new // old)
    divisor = np.gcd(old, new)
    rows = resampling._resample_by_rows(x, old // divisor, new // divisor, length)
    np.testing.assert_allclose(rows, resample(x, old, new), atol=1e-6)


def test_blocks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.random.default_rng(0).standard_normal(40_000).astype(np.float32)
    whole = resample(x, 22_254, 16_000)
    monkeypatch.setattr(resampling, "BLOCK", 5000)
    assert (resample(x, 22_254, 16_000) == whole).all()


@pytest.mark.parametrize("length", [1, 2, 47, 8000, 11_127, 11_128])
def test_short_recordings(length: int) -> None:
    y = resample(np.ones(length, np.float32), 22_254, 16_000)
    assert len(y) == -(-length * 8000 // 11_127) and np.isfinite(y).all()


def test_a_constant_stays_constant() -> None:
    y = resample(np.full(30_000, 0.25, np.float32), 11_127, 16_000)
    np.testing.assert_allclose(y[200:-200], 0.25, atol=1e-6)


def test_memory_is_bounded() -> None:
    """A matrix for these rates would have 90 million elements."""
    x = np.ones(200_000, np.float32)
    tracemalloc.start()
    resample(x, 22_254, 16_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60e6
