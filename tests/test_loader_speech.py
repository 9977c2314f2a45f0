"""The loader on real speech: FLAC shards that d2v-shards makes of the embedded corpus."""

from __future__ import annotations

import hashlib
import shutil
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from d2v_ds.errors import UserError
from d2v_ds.loader import Loader, read_samples
from d2v_ds.modalities.speech import Speech, SpeechConfig, frames
from d2v_ds.shard_format import ShardSet, open_set
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
        assert step.masked_count == sum(len(batch.masked) for batch in step.micro_batches)
        for batch in step.micro_batches:
            B, S = batch.inputs.shape
            assert B == len(batch.keys) and S <= 3 * 16_000
            assert batch.seen.shape == (2 * B, frames(S, CONFIG.convs))
            assert 0.5 < float(batch.inputs.std()) < 2  # normalised over the utterance, padded


def test_workers_decode_the_same_speech(speech: ShardSet) -> None:
    assert digests(speech, 0) == digests(speech, 2)


def test_a_damaged_recording_is_named(speech: ShardSet, tmp_path: Path) -> None:
    root = tmp_path / "damaged"
    shutil.copytree(speech.root, root)
    tar = sorted(root.glob("*.tar"))[0]
    data = bytearray(tar.read_bytes())
    at = data.index(b"fLaC") + 2000
    data[at : at + 8] = bytes(8)
    tar.write_bytes(data)
    loader = Loader(open_set(root, "speech"), Speech(CONFIG), seed=1, size=24, micro_batches=2)
    with closing(loader), pytest.raises(UserError, match=f"{tar}, sample '.*': its checksum"):
        list(islice(loader, loader.stats.steps))
