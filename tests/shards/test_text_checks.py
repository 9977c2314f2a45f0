"""Text sets: verify and training refuse the same samples, and a run tells what it does not use."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d2v_ds.data.checks import Unusable
from d2v_ds.modalities.text import MaskConfig, Text, TextConfig

ABOUT = {"tokenizer": {"vocab_size": 40, "pad_id": 1, "eos_id": 2, "mask_id": 39}}
TEXT = Text(TextConfig(vocab_size=40, pad_id=1, mask_id=39, max_tokens=16))


def packed(field: str, ids: list[int], kind: str = "<u2") -> dict[str, bytes]:
    array = np.array(ids, dtype=kind if field == "npy" else {"u16": "<u2", "u32": "<u4"}[field])
    if field != "npy":
        return {field: array.tobytes()}
    buffer = io.BytesIO()
    np.save(buffer, array)
    return {field: buffer.getvalue()}


def outcome(sample: dict[str, bytes], verify: bool) -> str:
    """The kind and the part of the reason that both have in common; "" for a good sample."""
    try:
        Text.check_sample(sample, ABOUT) if verify else TEXT.decode(sample, None)
    except Unusable as error:
        place = "its tokenizer's " if verify else "modality.text."
        return f"{error.kind}: {str(error).replace(place, '')}"
    return ""


SAMPLES = st.builds(
    packed,
    st.sampled_from(["u16", "u32", "npy"]),
    st.lists(st.integers(0, 42) | st.integers(2, 38), max_size=12),
    st.sampled_from(["<u2", "<u4", "<i8"]),
)
BROKEN = st.dictionaries(
    st.sampled_from(["u16", "u32", "npy", "json"]), st.binary(max_size=150), min_size=1
)


@settings(max_examples=300, deadline=None)
@given(SAMPLES | BROKEN.filter(lambda sample: "json" not in sample) | BROKEN.map(dict.copy))
def test_verify_and_training_refuse_the_same_samples(sample: dict[str, bytes]) -> None:
    sample.pop("json", None)
    assert outcome(sample, verify=True) == outcome(sample, verify=False)


@pytest.mark.parametrize(
    ("sample", "reason"),
    [
        (packed("u16", [5, 40]), "ids: has token id 40, but vocab_size is 40"),
        (packed("u16", [5, 1]), "ids: has token id 1, which is pad_id"),
        (packed("u32", [39]), "ids: has token id 39, which is mask_id"),
        (packed("npy", []), "empty: holds no token ids"),
        ({"u16": b"\5\0\6"}, "truncated: ends within a token id"),
        (packed("npy", [5], "<i8"), "format: holds int64 of shape (1,), expected one dimension of"),
        ({"npy": b"no array"}, "damaged: cannot be read as a .npy array"),
        ({"txt": b"text"}, "row: has no token ids (members: txt)"),
        (packed("u16", [5, 2, 38]), ""),
    ],
)
def test_reasons(sample: dict[str, bytes], reason: str) -> None:
    found = outcome(sample, verify=False)
    assert found.startswith(reason) and bool(found) == bool(reason)


def test_tokens_that_an_epoch_does_not_use_are_told() -> None:
    text = Text(TextConfig(max_tokens=128))
    assert text.remarks({128: 700, 60: 1}) == []
    assert text.remarks({512: 734, 76: 1, 1: 2}) == [
        "2 samples are too short",
        "an epoch uses 94,028 of 375,886 tokens (25%): 734 samples are longer than "
        "modality.text.max_tokens=128, and of each only a random piece is read, so 281,856 tokens "
        "are lost; use all with `d2v-shards text --block 128`, or with "
        "modality.text.max_tokens=512",
    ]


def test_no_random_token_is_padding() -> None:
    mask = MaskConfig(prob=0.5, random_prob=1.0)
    config = TextConfig(masked="replaced", vocab_size=12, pad_id=9, mask_id=11, mask=mask)
    ids, chosen = np.full(500, 5), np.ones((8, 500), dtype=bool)
    found = Text(config).corrupt(ids, chosen, np.random.default_rng(0))
    assert set(np.unique(found)) == {*range(4, 12)} - {9}
