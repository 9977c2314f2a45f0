"""Batches: indices computed from the masks, and moving between devices."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from d2v_ds.batch import Batch, mask_indices
from tests.helpers import variants


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


def test_mask_indices_with_padding_between_tokens() -> None:
    drawn = [np.array([[True, False, False]]), np.array([[False, False, True]])]
    valid = np.array([[True, True, True], [True, False, False]])
    found = mask_indices(drawn, valid=valid)
    batch = Batch("text", 0, torch.zeros(2, 3), **found)
    assert found["visible"].tolist() == [[1, 2], [0, 1]] and found["masked"].tolist() == [0, 5]
    assert batch.padded and batch.exists() is None
    assert batch.attended().tolist() == [[True, True], [True, False]]  # type: ignore[union-attr]


@pytest.mark.parametrize("variant", variants.VARIANTS)
def test_every_tensor_moves_and_is_copied(variant: str) -> None:
    batch = variants.batch_of(variants.build(variant), 20, 40)
    assert len(batch.seen) == len(batch.inputs) * batch.views
    moved, copied = batch.to(torch.device("meta")), batch.copied()
    for field in dataclasses.fields(batch):
        value, other = getattr(batch, field.name), getattr(copied, field.name)
        if isinstance(value, torch.Tensor):
            assert getattr(moved, field.name).is_meta
            assert torch.equal(value, other) and value.data_ptr() != other.data_ptr()
        else:
            assert value is other


def test_attention_masks_of_padding() -> None:
    drawn = [np.array([[True, False, False]] * 2), np.array([[True, False]] * 2)]
    batch = Batch("text", 0, torch.zeros(2, 3), views=2, **mask_indices(drawn))
    exists = batch.exists_views()
    assert exists is not None and exists.squeeze(2).tolist() == [
        *([[True, True, True]] * 2),
        *([[True, True, False]] * 2),
    ]
    attended = batch.attended()  # the second sample has only one visible token
    assert attended is not None and attended.tolist() == [
        *([[True] * 2] * 2),
        *([[True, False]] * 2),
    ]
    replaced = Batch("text", 0, torch.zeros(2, 3), views=2, **mask_indices(drawn, removed=False))
    attended = replaced.attended()
    assert attended is not None and torch.equal(attended, exists.squeeze(2))
    whole = Batch("text", 0, torch.zeros(1, 3), views=2, **mask_indices(drawn[:1]))
    assert whole.exists() is whole.exists_views() is whole.attended() is None
