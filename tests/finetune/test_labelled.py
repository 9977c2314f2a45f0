"""Samples with labels: what the loader reads in fine-tuning."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from d2v_ds.errors import UserError
from tests.helpers import labelled, variants
from tests.helpers.labelled import batch_of, build, reader, sample

SIZES = [30, 11, 22]
LABELS: dict[str, list[Any]] = {
    "speech": ["ab a", "c", ""],
    "vision": ["up", "left", "right"],
    "text": ["up", "left", "right"],
}


def samples_of(variant: str) -> list[labelled.Sample]:
    labels = LABELS[variant.split("_")[1]]
    return [
        sample(variant, n, label, seed)
        for seed, (n, label) in enumerate(zip(SIZES, labels, strict=True))
    ]


def logits(task: Any, batch: Any) -> list[torch.Tensor]:
    """The logits of each sample, without padding."""
    found, valid = task.logits(batch), batch.valid
    if found.dim() == 2:
        return list(found)
    lengths = [found.shape[1]] * len(found) if valid is None else valid.sum(1).tolist()
    return [row[:n] for row, n in zip(found, lengths, strict=True)]


@pytest.mark.parametrize("variant", variants.VARIANTS)
@torch.no_grad()
def test_a_padded_batch_gives_what_single_samples_give(variant: str) -> None:
    task = build(variant).eval()
    modality, found = reader(task, training=False), samples_of(variant)
    together = batch_of(modality, found)
    alone = [batch_of(modality, [one]) for one in found]
    for ours, one in zip(logits(task, together), alone, strict=True):
        [expected] = logits(task, one)
        torch.testing.assert_close(ours, expected, atol=2e-5, rtol=1e-4)
    loss, _ = task(together, len(found))
    separate = sum(float(task(one, 1)[0]) for one in alone) / len(found)
    assert float(loss) == pytest.approx(separate, rel=1e-4)


@pytest.mark.parametrize("variant", variants.VARIANTS)
def test_labels_of_a_batch(variant: str) -> None:
    modality = reader(build(variant), training=False)
    batch, labels = batch_of(modality, samples_of(variant)), LABELS[variant.split("_")[1]]
    if "speech" in variant:
        assert batch.label_lengths.tolist() == [4, 1, 0]
        assert batch.labels.tolist() == [2, 3, 1, 2, 4]
    else:
        assert batch.label_lengths is None
        assert batch.labels.tolist() == [
            [float(name == label) for name in labelled.CLASSES] for label in labels
        ]
    assert batch.terms == len(SIZES) and batch.views == 1


def test_numbers_are_labels_of_texts() -> None:
    task = build("v2_text", task="regression", labels=("value",))
    batch = batch_of(reader(task), [sample("v2_text", 9, 3.5), sample("v2_text", 9, "-1")])
    assert batch.labels.tolist() == [3.5, -1.0]


# -------------------------------------------------------------------------------------------- masks


def test_masks_are_drawn_in_training_only() -> None:
    masks = {"time_mask": 0.5, "time_mask_length": 4, "time_mask_with": "zero"}
    task = build("v2_speech", **masks, channel_mask=0.3, channel_mask_length=4)
    found = samples_of("v2_speech")
    batch = batch_of(reader(task), found)
    hidden = batch.valid & ~batch.seen
    shares = hidden.sum(1) / batch.valid.sum(1)
    assert ((shares > 0.1) & (shares < 0.9)).all() and not (batch.seen & ~batch.valid).any()
    assert batch.channels.shape == (3, 32) and batch.channels.any(1).all()
    assert not batch.channels.all(1).any() and not batch.channels[0].equal(batch.channels[1])
    again = batch_of(reader(task), found)
    assert batch.seen.equal(again.seen) and batch.channels.equal(again.channels)
    whole = batch_of(reader(task, training=False), found)
    assert whole.channels is None and whole.seen.equal(whole.valid)
    assert whole.inputs.equal(batch.inputs)  # recordings with a transcript are read whole


@pytest.mark.parametrize("kind", ["token", "zero", "noise"])
def test_what_replaces_masked_tokens(kind: str) -> None:
    variant = "v1_speech" if kind == "token" else "v2_speech"
    masks = {"time_mask": 0.5, "time_mask_length": 4, "time_mask_with": kind}
    task = build(variant, **masks, channel_mask=0.3, channel_mask_length=4).train()
    batch = batch_of(reader(task), samples_of(variant))
    tokens = torch.ones(*batch.seen.shape, 32)
    masked = task.masked(batch, tokens)
    hidden = masked[~batch.seen]
    kept = batch.channels[:, None].expand_as(tokens)
    assert (masked[batch.seen] == kept[batch.seen]).all()
    if kind == "token":
        token = task.encoder.front_end("speech").mask_token
        assert token is not None
        expected = (token.embedding * kept)[~batch.seen]
        torch.testing.assert_close(hidden, expected)
    else:
        assert (hidden.abs() < 0.1).all() and (hidden == 0).all() == (kind == "zero")
    assert task.eval().masked(batch, tokens) is tokens


def test_embeddings_of_texts_have_their_dropout() -> None:
    task = build("v2_text", "modality.text.dropout=0.5").train()
    batch = batch_of(reader(task), samples_of("v2_text"))
    dropped = (task.masked(batch, torch.ones(*batch.seen.shape, 32)) == 0).float().mean()
    assert 0.4 < float(dropped) < 0.6


# ------------------------------------------------------------------------------------ whole samples


def test_texts_begin_with_bos_and_are_cut() -> None:
    modality = reader(build("v2_text", bos_id=3))
    for size in (5, 39, 40, 60):
        ids, _ = modality.decode(sample("v2_text", size, "up"), np.random.default_rng(0))
        own, _ = reader(build("v2_text", bos_id=None)).decode(sample("v2_text", size, "up"), None)
        assert ids.tolist() == [3, *own.tolist()][:40]
        assert modality.fit((ids, 0), size)[0] is ids, "not a bad sample"
    ids = modality.begun(np.array([3, 7, 8]))
    assert ids.tolist() == [3, 7, 8], "it begins with bos already"
    assert modality.fit((ids, 0), 3)[0] is ids, "not a bad sample"
    assert [modality.is_cut(n) for n in (5, 39, 40, 60)] == [False, False, True, True]


def test_classified_recordings_are_validated_whole() -> None:
    """Training crops them."""
    crop = "modality.speech.crop_seconds=0.5"
    task = build("v2_speech", crop, task="classification", labels=labelled.CLASSES)
    one = sample("v2_speech", 50, "up")
    frames = 320 * 50 + 80
    train, held_out = reader(task), reader(task, training=False)
    (content, _), rng = train.decode(one, np.random.default_rng(0)), np.random.default_rng(0)
    assert len(content) == 8_000 and train.crop(frames) == 8_000
    whole = held_out.decode(one, rng)
    assert len(whole[0]) == frames == held_out.crop(frames)
    assert held_out.fit(whole, frames) is whole


# -------------------------------------------------------------------------------------- bad samples


@pytest.mark.parametrize("variant", ["v2_speech", "v2_text"])
def test_a_sample_that_replaces_a_bad_one_has_no_label(variant: str) -> None:
    task = build(variant).eval()
    modality, found = reader(task), samples_of(variant)
    first, second, _ = (modality.decode(one, None) for one in found)
    length = 320 * SIZES[1] + 80 if "speech" in variant else SIZES[1]
    replaced = modality.fit(first, length)
    assert replaced[1] is None and len(replaced[0]) == len(second[0])
    rngs = labelled.generators(2)
    batch = modality.collate([first, replaced], rngs, 0)
    if batch.label_lengths is not None:
        assert batch.label_lengths.tolist() == [4, -1] and batch.labels is not None
        assert len(batch.labels) == 4
    else:
        assert batch.labels is not None and batch.labels.sum(1).tolist() == [1, 0]
    with torch.no_grad():
        loss, sums = task(batch, 2)
        alone, _ = task(modality.collate([first], rngs[:1], 0), 2)
    assert float(loss) == pytest.approx(float(alone), rel=1e-4)
    assert len(task.outcomes(batch, sums)) == 1


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ({"label": "down"}, "finetune.label: x.png: its label 'down' is not among the 3 classes"),
        ({"class": "up"}, "finetune.label: x.png: its .json has no 'label' (it has: class, path)"),
        ({"label": None}, "finetune.label: x.png: its 'label' is null, expected text or a number"),
        ({"label": float("nan")}, "finetune.label: x.png: its 'label' is NaN, expected text or a"),
        ({"label": ["up"]}, "finetune.label: x.png: its 'label' is [\"up\"], expected text or a"),
        ({"label": "down", "path": ["a", "b", "c"]}, "finetune.label: a and 2 more: its label"),
    ],
)
def test_a_label_that_is_not_known_ends_the_run(label: dict[str, Any], message: str) -> None:
    modality = reader(build("v2_vision"))
    meta = {"path": "x.png", **label}
    if isinstance(meta["path"], list):  # of recordings that were joined
        meta["paths"] = meta.pop("path")
    one = {**sample("v2_vision", 0, ""), "json": json.dumps(meta).encode()}
    with pytest.raises(UserError) as caught:
        modality.decode(one, None)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("damaged", "message"),
    [
        (b"{", r"^json: is damaged \(Expecting property name enclosed in double quotes"),
        (b"null", "^json: is not an object$"),
        (b"\xff", r"^json: is damaged \('utf-8' codec can't decode byte 0xff"),
    ],
)
def test_a_damaged_json_is_a_bad_sample(damaged: bytes, message: str) -> None:
    modality = reader(build("v2_vision"))
    with pytest.raises(ValueError, match=message) as caught:
        modality.decode({**sample("v2_vision", 0, "up"), "json": damaged}, None)
    assert not isinstance(caught.value, UserError)


# --------------------------------------------------------------------------------------------- plan


def test_the_log_says_what_is_left_out_or_cut() -> None:
    speech = reader(build("v2_speech", max_seconds=2.0))
    assert [speech.crop(n) for n in (200, 16_000, 32_000, 32_001)] == [0, 16_000, 32_000, 0]
    assert speech.remarks({200: 2, 16_000: 5, 32_000: 1, 32_001: 4}) == [
        "4 of 12 samples are longer than finetune.max_seconds and left out",
        "2 of 12 samples are too short and left out",
    ]
    assert speech.remarks({16_000: 5}) == []
    text = reader(build("v2_text"))
    assert text.remarks({1: 1, 39: 4, 40: 2, 90: 3}) == [
        "1 of 10 samples are too short and left out",
        "5 of 10 samples are longer than 40 tokens and cut",
    ]
    assert reader(build("v2_vision")).remarks({1: 3, 10**6: 2}) == []


def test_texts_count_one_each() -> None:
    text = reader(build("v2_text"))
    assert (text.cost(2), text.cost(400), text.batch_unit) == (1, 1, "samples")
    speech = reader(build("v2_speech"))
    assert (speech.cost(32_000), speech.batch_unit) == (2.0, "s")
