"""The indices of a batch, from its masks."""

from __future__ import annotations

import numpy as np
import torch

from d2v_ds.batch import Batch, mask_indices


def test_mask_indices_of_a_ragged_batch() -> None:
    drawn = [np.array([[True, False, False], [False, False, True]]), np.array([[True, False]] * 2)]
    found = mask_indices(drawn)
    assert found["visible"].tolist() == [[1, 2], [0, 1], [1, 3], [1, 3]]
    assert found["masked"].tolist() == [0, 5, 6, 9]
    assert found["valid"].tolist() == [[True] * 3, [True, True, False]]
    assert found["ragged"] is True and found["padded"] is False
    replaced = mask_indices(drawn, removed=False)
    assert replaced["visible"] is None and replaced["ragged"] is False
    assert torch.equal(replaced["masked"], found["masked"])


def test_mask_indices_with_padding_among_the_tokens() -> None:
    drawn = [np.array([[True, False, False]]), np.array([[False, False, True]])]
    valid = np.array([[True, True, True], [True, False, False]])
    found = mask_indices(drawn, valid=valid)
    batch = Batch("text", 0, torch.zeros(2, 3), **found)
    assert found["visible"].tolist() == [[1, 2], [0, 1]] and found["masked"].tolist() == [0, 5]
    assert batch.padded and batch.exists() is None
    assert batch.attended().tolist() == [[True, True], [True, False]]  # type: ignore[union-attr]
