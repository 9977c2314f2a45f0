"""Text: token ids in, batches out; errors in data and settings."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest

from d2v_ds import seeding
from d2v_ds.errors import UserError
from d2v_ds.modalities import create_modalities
from d2v_ds.modalities.text import Text, TextConfig
from d2v_ds.telemetry.pictures import masked_picture


def rng(*path: int) -> np.random.Generator:
    return seeding.generator(0, *path)


def npy(ids: Any, kind: Any = np.uint16) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.asarray(ids, dtype=kind))
    return buffer.getvalue()


def text(**settings: Any) -> Text:
    small = {"vocab_size": 50, "mask_id": 49, "max_tokens": 16, "views": 2}
    return Text(TextConfig(**(small | settings)))


@pytest.mark.parametrize("kind", [np.uint16, np.uint32])
def test_blocks_of_ids_are_read(kind: Any) -> None:
    modality = text()
    ids = np.arange(4, 34)
    assert modality.decode({"npy": npy(ids, kind)}, None).tolist() == list(range(4, 20))
    pieces = {int(modality.decode({"npy": npy(ids, kind)}, rng(i))[0]) for i in range(200)}
    assert pieces == set(range(4, 19))  # every start of a block of 16 in 30 ids
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
        (npy([5, 50]), "has token id 50, but modality.text.vocab_size is 50"),
    ],
)
def test_data_that_is_not_a_block_of_ids(data: bytes, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        text().decode({"npy": data}, None)
    assert message in str(caught.value)


def test_a_batch_for_2_0() -> None:
    modality = text()
    samples = [np.arange(4, 20), np.arange(4, 14)]
    batch = modality.collate(samples, [rng(0), rng(1)], 0)
    assert batch.inputs[1].tolist() == [*range(4, 14), *[1] * 6]
    assert batch.valid is not None and batch.valid.sum(1).tolist() == [16, 10]
    assert batch.corrupted is None and batch.visible is not None
    planned = [modality.masked_tokens(n) for n in (16, 10)]
    assert len(batch.masked) == sum(n or 0 for n in planned) == 2 * (16 - 8) + 2 * (10 - 5)


def test_a_batch_for_1_0_with_80_10_10() -> None:
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
    # The views of a sample are corrupted differently.
    assert not np.array_equal(batch.corrupted[0], batch.corrupted[1])


def test_the_picture_of_text_has_a_column_per_token() -> None:
    modality = text()
    batch = modality.collate([np.arange(4, 14)], [rng()], 0)
    shown, masked = modality.picture(batch)
    assert shown.shape[0] == 10 and masked.shape == (10,)
    assert masked_picture(shown, masked).shape[2] == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vocab_size": 100}, "mask_id=50264 must be in [0, vocab_size=100)"),
        ({"max_tokens": 1}, "max_tokens: must be at least 2, got 1"),
        (
            {"mask": {"random_prob": 0.6, "keep_prob": 0.5}},
            "must be 0 or more, and their sum at most 1",
        ),
        ({"mask": {"length": 0}}, "length: must be at least 1, got 0"),
        ({"masked": "replaced", "text_teacher": "masked"}, "requires views=1, got 8"),
        ({"specials": 50_265}, "specials=50265 must be in [0, 50265)"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        create_modalities({"text": settings})
    assert str(caught.value).startswith("modality.text") and message in str(caught.value)
