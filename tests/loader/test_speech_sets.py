"""The loader on real speech: FLAC shards that d2v-shards makes from the bundled corpus."""

from __future__ import annotations

import hashlib
import io
import shutil
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import soundfile
import torch
from torch.nn import functional as F

from d2v_ds.data.shard_format import ShardSet, open_set
from d2v_ds.loader.loader import Loader
from d2v_ds.loader.reading import read_samples
from d2v_ds.modalities.speech import Speech, SpeechConfig, token_count
from shards import samples
from shards.cli import main as d2v_shards

CONFIG = SpeechConfig(views=2, crop_seconds=3.0, min_seconds=1.0)


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    out = tmp_path_factory.mktemp("speech") / "unseen"
    source = samples.path("speech") / "unseen.tsv"
    options = ["--join", "speaker", "--join-seconds", "4", "--shard-size", "300KB", "-j", "1"]
    assert d2v_shards(["speech", str(source), str(out), *options]) == 0
    return open_set(out, "speech")


def digests(speech: ShardSet, workers: int) -> list[Any]:
    loader = Loader(speech, Speech(CONFIG), seed=1, size=24, micro_batches=2, workers=workers)
    with closing(loader):
        return [
            (batch.keys, hashlib.sha256(batch.inputs.numpy()).hexdigest(), batch.masked.tolist())
            for step in islice(loader, loader.stats.steps + 1)
            for batch in step.micro_batches
        ]


def test_an_epoch_of_real_speech(speech: ShardSet) -> None:
    lengths = {key: len(sample["flac"]) for key, sample in read_samples(speech, ("flac",))}
    loader = Loader(speech, Speech(CONFIG), seed=1, size=24, micro_batches=2)
    with closing(loader):
        steps = list(islice(loader, loader.stats.steps))
        assert loader.stats.units <= speech.length / speech.sample_rate
    keys = [key for step in steps for batch in step.micro_batches for key in batch.keys]
    assert len(keys) > 4 and len(set(keys)) == len(keys) == loader.stats.samples
    assert set(keys) <= set(lengths)
    for step in steps:
        assert step.units <= 24 and step.modality == "speech"
        assert step.count == sum(len(batch.masked) for batch in step.micro_batches)
        for batch in step.micro_batches:
            B, S = batch.inputs.shape
            assert B == len(batch.keys) and S <= 3 * 16_000
            assert batch.seen.shape == (2 * B, token_count(S, CONFIG.convs))
            assert 0.5 < float(batch.inputs.std()) < 2  # normalised per utterance, padded


def test_workers_decode_the_same_speech(speech: ShardSet) -> None:
    assert digests(speech, 0) == digests(speech, 2)


def test_a_damaged_recording_is_replaced(speech: ShardSet, tmp_path: Path) -> None:
    root = tmp_path / "damaged"
    shutil.copytree(speech.root, root)
    tar = sorted(root.glob("*.tar"))[0]
    data = bytearray(tar.read_bytes())
    at = data.index(b"fLaC") + 2000
    data[at : at + 8] = bytes(8)
    tar.write_bytes(data)
    loader = Loader(open_set(root, "speech"), Speech(CONFIG), seed=1, size=24, micro_batches=2)
    with closing(loader):
        steps = list(islice(loader, loader.stats.steps))
    assert sum(sum(step.bad.values()) for step in steps) == 1
    [bad] = loader.quarantine.bad.values()
    assert (bad.tar, bad.key) == (str(tar), next(iter(read_samples(speech, ())))[0])


# -------------------------------------------------------------------------------------- decoding


def tone(seconds: float, seed: int = 0) -> npt.NDArray[np.int16]:
    """Noise, of which no two parts are equal."""
    rng = np.random.default_rng(seed)
    return rng.normal(300, 4000, round(16_000 * seconds)).astype(np.int16)


def encoded(samples: npt.NDArray[Any], kind: str, subtype: str = "PCM_16") -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, 16_000, format=kind, subtype=subtype)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["wav", "flac"])
def test_mean_and_variance_are_those_of_the_whole_utterance(kind: str) -> None:
    """Layer norm as in torch, then a crop (fairseq raw_audio_dataset.py)."""
    samples = tone(5)
    waveform = torch.from_numpy(samples.astype(np.float32) / 32768)
    expected = F.layer_norm(waveform, waveform.shape).numpy()
    modality = Speech(CONFIG)
    data = {kind: encoded(samples, kind)}
    np.testing.assert_allclose(modality.decode(data, None), expected, atol=2e-6)
    for seed in range(5):
        crop = modality.decode(data, np.random.default_rng(seed))
        start = int(np.random.default_rng(seed).integers(32_001))
        np.testing.assert_allclose(crop, expected[start : start + 48_000], atol=2e-6)


@pytest.mark.parametrize("kind", ["wav", "flac"])
def test_only_the_crop_of_a_long_recording_is_decoded(kind: str) -> None:
    samples = tone(15)
    data = encoded(samples, kind)
    crop = Speech(CONFIG).decode({kind: data}, np.random.default_rng(0))
    start = int(np.random.default_rng(0).integers(15 * 16_000 - 48_000 + 1))
    piece = torch.from_numpy(samples[start : start + 48_000].astype(np.float32) / 32768)
    np.testing.assert_allclose(crop, F.layer_norm(piece, piece.shape).numpy(), atol=2e-6)
    if kind == "flac":  # the decoder does not see damage elsewhere, which checksums detect
        at = int(len(data) * (0.9 if start < 6 * 16_000 else 0.1))
        hurt = data[:at] + bytes([data[at] ^ 16]) + data[at + 1 :]
        with pytest.raises(ValueError):
            Speech(CONFIG).decode({kind: hurt}, None)
        assert np.array_equal(Speech(CONFIG).decode({kind: hurt}, np.random.default_rng(0)), crop)


def test_other_widths_and_channels() -> None:
    samples = tone(2)
    expected = Speech(CONFIG).decode({"wav": encoded(samples, "wav")}, None)
    for data in (
        encoded(samples.astype(np.float32) / 32768, "wav", "FLOAT"),
        encoded(np.stack([samples, samples], 1), "wav"),
        encoded(np.stack([samples, samples], 1), "flac"),
    ):
        np.testing.assert_allclose(Speech(CONFIG).decode({"wav": data}, None), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("samples", "reason"),
    [
        (np.full(32_000, 7, np.int16), "is silent"),
        (np.zeros(32_000, np.int16), "is silent"),
        (tone(0.5), "is 8000 audio samples long, but at least"),
        (np.full(32_000, np.nan, np.float32), "contains NaN or infinite samples"),
    ],
)
def test_recordings_that_are_useless_for_training(samples: npt.NDArray[Any], reason: str) -> None:
    data = encoded(samples, "wav", "PCM_16" if samples.dtype == np.int16 else "FLOAT")
    with pytest.raises(ValueError, match=reason):
        Speech(CONFIG).decode({"wav": data}, np.random.default_rng(0))
