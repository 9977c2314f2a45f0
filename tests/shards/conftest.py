"""Speech sets and recordings that several test files of this folder share."""

from __future__ import annotations

from pathlib import Path

import pytest

from d2v_ds.data import audio
from shards import samples
from shards.cli import main

SPEECH = samples.path("speech")


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of 50 recordings in a few shards, without problems."""
    out = tmp_path_factory.mktemp("sets") / "seen"
    arguments = ["speech", str(SPEECH / "seen.tsv"), str(out), "--shard-size", "60KB", "-j1"]
    assert main(arguments) == 0
    return out


@pytest.fixture
def flac() -> tuple[bytes, int]:
    """An encoded recording and its length in frames."""
    data = (SPEECH / "recordings/0_theo_0.flac").read_bytes()
    return data, audio.info(data).frames
