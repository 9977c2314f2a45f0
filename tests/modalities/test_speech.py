"""Speech: lengths, costs, warnings, and errors in settings. tests/loader/test_speech_sets.py reads
recordings."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from d2v_ds import seeding
from d2v_ds.errors import UserError
from d2v_ds.modalities import create_modalities
from d2v_ds.modalities.speech import PUBLISHED_CONVS, Speech, SpeechConfig, pad, token_count


def test_lengths_and_costs() -> None:
    modality = Speech(SpeechConfig(crop_seconds=4.0, min_seconds=1.0, views=3))
    assert [modality.crop(n) for n in (15_999, 16_000, 50_000, 64_001)] == [
        *(0, 16_000, 50_000, 64_000)
    ]
    assert modality.cost(32_000) == 2.0 and modality.cost(10**6) == 4.0
    assert modality.masked_tokens(10**6) == 3 * (token_count(64_000, PUBLISHED_CONVS) // 2)
    assert len(modality.largest()) == 64_000


@pytest.mark.parametrize("T", [1, 2, 50, 999])
def test_samples_of_frames_are_the_inverse_of_frames_of_samples(T: int) -> None:
    samples = Speech(SpeechConfig()).samples(T)
    assert (
        token_count(samples, PUBLISHED_CONVS) == T
        and token_count(samples - 1, PUBLISHED_CONVS) == T - 1
    )


def test_a_batch_of_waveforms() -> None:
    modality = Speech(SpeechConfig(min_seconds=0.1, views=2))
    samples = [np.full(n, n, np.float32) for n in (16_000, 8_000)]
    batch = modality.collate(samples, [seeding.generator(0, i) for i in range(2)], 3)
    assert batch.index == 3 and batch.inputs.shape == (2, 16_000)
    assert not batch.inputs[1, 8_000:].any() and (batch.inputs[1, :8_000] == 8_000).all()
    assert batch.valid is not None and batch.valid.sum(1).tolist() == [49, 24]
    planned = [modality.masked_tokens(n) or 0 for n in (16_000, 8_000)]
    assert len(batch.masked) == sum(planned) == 2 * 24 + 2 * 12
    assert pad(samples).equal(batch.inputs)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"convs": []}, "convs: needs at least one (channels, kernel, stride)"),
        ({"min_seconds": 0.02}, "min_seconds=0.02 is shorter than two frames"),
        ({"crop_seconds": 1.0}, "crop_seconds=1.0 is below min_seconds=2.0"),
        ({"mask": {"prob": 0.0}}, "mask.prob: must be in (0, 1), got 0.0"),
        ({"mask": {"length": 0}}, "mask.length: must be at least 1, got 0"),
        ({"crop_seconds": float("nan")}, "crop_seconds: must be a finite number, got nan"),
        ({"min_seconds": float("inf")}, "min_seconds: must be a finite number, got inf"),
        ({"convs": [[512, 10, 0]]}, "convs[0][2]: must be at least 1, got 0"),
        ({"mask": {"kind": "beit"}}, "mask.kind: expected one of blocks, spans, got 'beit'"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        create_modalities({"speech": settings})
    assert str(caught.value).startswith("modality.speech") and message in str(caught.value)
