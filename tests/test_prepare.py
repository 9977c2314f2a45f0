"""Raw inputs of a library user become the examples that the shards of the same content give."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from d2v_ds.encoder import PretrainedEncoder, encoder_of
from d2v_ds.errors import UserError
from tests.helpers import variants
from tests.helpers.sensor import Sensor, SensorConfig


def encoder(variant: str) -> PretrainedEncoder:
    task = variants.build(variant).eval()
    return encoder_of(task, variant.partition("_")[2], "student")


@pytest.fixture(scope="module")
def speech() -> PretrainedEncoder:
    return encoder("v2_speech")


@pytest.fixture(scope="module")
def vision() -> PretrainedEncoder:
    return encoder("v2_vision")


@pytest.fixture(scope="module")
def text() -> PretrainedEncoder:
    return encoder("v2_text")


# ------------------------------------------------------------------------------------------- speech


def recording(pcm: np.ndarray, rate: int = 16_000, subtype: str = "PCM_16") -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, pcm, rate, format="WAV", subtype=subtype)
    return buffer.getvalue()


PCM = np.random.default_rng(0).integers(-9000, 9000, 4000).astype(np.int16)


def test_waveforms_of_every_type(speech: PretrainedEncoder, tmp_path: Path) -> None:
    data = recording(PCM)
    expected = speech.modality.decode({"wav": data}, None)
    (tmp_path / "a.wav").write_bytes(data)
    unit = PCM / 32768
    for exact in (PCM, torch.from_numpy(PCM), PCM[None], data, tmp_path / "a.wav"):
        given = speech.prepare(exact, rate=16_000)
        assert given.dtype == np.float32 and np.array_equal(given, expected)
    for raw in (unit, unit.astype(np.float32), torch.from_numpy(unit), list(unit)):
        np.testing.assert_allclose(speech.prepare(raw, rate=16_000), expected, atol=1e-5)
    half = speech.prepare(torch.from_numpy(unit).bfloat16(), rate=16_000)
    np.testing.assert_allclose(half, expected, atol=0.03)
    speech([expected, speech.prepare(PCM[:3000], rate=16_000)])


@pytest.mark.parametrize(
    ("raw", "rate", "message"),
    [
        (PCM, None, "rate is missing, but the model needs 16000 Hz; resample it first"),
        (PCM, 8000, "has 8000 Hz, but the model needs 16000 Hz; resample it first"),
        (recording(PCM, rate=8000), None, "is 8000 Hz, expected 16000 Hz"),
        (PCM[:300], 16_000, "is 300 audio samples long, but the model needs at least"),
        (PCM[:0], 16_000, "is empty"),
        (PCM.astype(np.int32), 16_000, r"is int32 of shape \[4000\], expected one channel"),
        (PCM.reshape(2, -1), 16_000, r"is int16 of shape \[2, 2000\], expected one channel"),
        (np.full(4000, np.nan), 16_000, "contains NaN or infinite samples"),
        (b"no audio", 16_000, "the input is not audio that libsndfile reads"),
        ("/nowhere.wav", 16_000, r"^/nowhere\.wav: cannot be read \(No such file"),
        (None, 16_000, r"is object of shape \[\], expected one channel"),
    ],
)
def test_bad_waveforms(speech: PretrainedEncoder, raw: Any, rate: int | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        speech.prepare(raw, rate=rate)


# ------------------------------------------------------------------------------------------- images


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


PIXELS = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)


def test_images_of_every_type(vision: PretrainedEncoder, tmp_path: Path) -> None:
    data = png(PIXELS)
    expected = vision.modality.decode({"png": data}, None)
    (tmp_path / "a.png").write_bytes(data)
    raws: list[Any] = [data, tmp_path / "a.png", str(tmp_path / "a.png"), PIXELS]
    raws += [PIXELS.transpose(2, 0, 1), torch.from_numpy(PIXELS), Image.fromarray(PIXELS)]
    raws += [Image.open(io.BytesIO(data))]
    for raw in raws:
        assert np.array_equal(vision.prepare(raw), expected)
    grey = vision.modality.decode({"png": png(PIXELS[:, :, 0])}, None)
    assert np.array_equal(vision.prepare(PIXELS[:, :, 0]), grey)
    vision([expected, grey])


def test_large_jpegs_as_files_and_as_images(vision: PretrainedEncoder) -> None:
    """A file is decoded at a lower resolution, as in a shard; an image of the caller stays as it
    is, and the result differs little."""
    large = Image.fromarray(PIXELS[:5, :7]).resize((700, 500), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    large.save(buffer, "JPEG", quality=95)
    expected = vision.modality.decode({"jpg": buffer.getvalue()}, None)
    assert np.array_equal(vision.prepare(buffer.getvalue()), expected)
    image = Image.open(buffer)
    found = vision.prepare(image)
    assert image.size == (700, 500)
    assert np.abs(found.astype(int) - expected).mean() < 4


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (PIXELS.astype(np.float32), r"is float32 of shape \[50, 70, 3\], expected an image file"),
        (PIXELS[:, :, :2], r"is uint8 of shape \[50, 70, 2\], expected an image file"),
        (b"no image", "the input cannot be read as an image"),
        (png(PIXELS)[:2000], "the input ends within its pixels"),
        ("/nowhere.png", r"^/nowhere\.png: cannot be read \(No such file"),
        (None, r"is object of shape \[\], expected an image file"),
        (PIXELS[:0], "the input is empty"),
    ],
)
def test_bad_images(vision: PretrainedEncoder, raw: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        vision.prepare(raw)


# --------------------------------------------------------------------------------------------- text


def test_ids_of_every_type(text: PretrainedEncoder) -> None:
    ids = np.arange(4, 48, dtype=np.uint16)  # longer than max_tokens
    expected = text.modality.decode({"u16": ids.tobytes()}, None)
    assert len(expected) == 40
    for raw in (ids, ids.tolist(), tuple(ids.tolist()), torch.arange(4, 48), ids.astype(np.int32)):
        given = text.prepare(raw)
        assert given.dtype == np.int64 and np.array_equal(given, expected)
    text([expected, text.prepare([5, 6])])


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ("some words", "is text, expected token ids; tokenize it"),
        ([], "is empty"),
        ([4, 50], r"has token id 50, expected 0 to 49 \(modality.text.vocab_size\)"),
        ([4, -1], "has token id -1, expected 0 to 49"),
        ([0.5], r"is float64 of shape \[1\], expected token ids"),
        ([[4, 5]], r"is int64 of shape \[1, 2\], expected token ids"),
        (7, r"is int64 of shape \[\], expected token ids"),
        ([[1], [2, 3]], "the input "),
    ],
)
def test_bad_ids(text: PretrainedEncoder, raw: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        text.prepare(raw)


# ------------------------------------------------------------------------------------------ forward


def test_forward_refuses_what_is_no_list_of_examples(
    speech: PretrainedEncoder, vision: PretrainedEncoder, text: PretrainedEncoder
) -> None:
    for each in (speech, vision, text):
        for nothing in ([], "some words"):
            with pytest.raises(UserError, match="takes a list of at least one example"):
                each(nothing)
    wave = np.zeros(4000, dtype=np.float32)
    with pytest.raises(UserError, match=r"example 0 is float32 of shape \[\].*`prepare`"):
        speech(wave)
    with pytest.raises(UserError, match="takes a list of at least one example"):
        speech(None)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"example 0 is a torch tensor, float32 of shape \[800\]"):
        speech([torch.zeros(800)])
    with pytest.raises(UserError, match="example 1 is int16 of shape"):
        speech([wave, PCM])
    with pytest.raises(UserError, match="example 0 is of type list, expected token ids"):
        text([[4, 5]])
    with pytest.raises(UserError, match="example 0 has 41 tokens, expected 1 to 40"):
        text([np.full(41, 4)])
    with pytest.raises(UserError, match=r"example 0 is uint8 of shape \[50, 70, 3\], expected"):
        vision([PIXELS])


def test_a_modality_without_raw_inputs_says_so() -> None:
    with pytest.raises(ValueError, match="series: takes no raw input; give what"):
        Sensor(SensorConfig()).prepare([1.0])
