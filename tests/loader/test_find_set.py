"""Values of data.shards: sets, tars without an index (indexed once), and tars at URLs."""

from __future__ import annotations

import io
import os
import shutil
from collections import Counter
from contextlib import closing
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import soundfile
import webdataset

from d2v_ds.data.cache.stage import stage
from d2v_ds.errors import UserError
from d2v_ds.loader.find_set import find_set, stream_tars
from d2v_ds.loader.loader import Loader
from d2v_ds.loader.reading import read_samples
from d2v_ds.modalities.speech import Speech, SpeechConfig
from tests.helpers.http_server import Server, start, stop


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("D2V_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_tars_without_an_index_are_indexed_on_first_use(tmp_path: Path, cache: Path) -> None:
    folder = speech_tars(tmp_path / "tars")
    first = find_set(folder, "speech")
    assert first.root == folder and (folder / "index.json").exists()
    assert first.samples == 6 and find_set(folder) == first
    assert [key for key, _ in read_samples(first, ("wav",))] == [f"clip{i}" for i in range(6)]


def test_the_index_of_a_read_only_folder_is_in_the_cache(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = speech_tars(tmp_path / "tars")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    found = find_set(folder, "speech")
    assert found.root.parent == cache and found.tars == folder.resolve()
    assert len(list(read_samples(found, ("wav",)))) == 6
    assert sorted(os.listdir(folder)) == ["a-000000.tar", "a-000001.tar"]
    assert find_set(folder, "speech") == found


def test_indexed_tars_are_staged_and_read_from_a_url(tmp_path: Path, cache: Path) -> None:
    """Their index has no SHA-256 of the tars, so copies are compared by size."""
    found = find_set(speech_tars(tmp_path / "tars"), "speech")
    expected = list(read_samples(found, ("wav",)))
    copy = stage(found, tmp_path / "local", lambda: None)
    assert copy and list(read_samples(find_set(copy, "speech"), ("wav",))) == expected
    state = Server("", Counter())
    server = start(state, tmp_path)
    try:
        far = find_set(f"http://127.0.0.1:{server.server_address[1]}/tars", "speech")
        assert list(read_samples(far, ("wav",))) == expected
    finally:
        stop(server)
    os.truncate(found.root / "a-000001.tar", 70_000)
    with pytest.raises(UserError, match=r"a-000001.tar: has 70000 bytes, but index.json has \d+"):
        stage(found, tmp_path / "other", lambda: None)


def test_a_damaged_tar_without_an_index_is_named(tmp_path: Path, cache: Path) -> None:
    folder = speech_tars(tmp_path / "tars")
    os.truncate(folder / "a-000001.tar", 70_000)
    with pytest.raises(UserError, match=r"a-000001.tar"):
        find_set(folder, "speech")
    shutil.rmtree(folder)
    with pytest.raises(UserError, match="no such shard set"):
        find_set(folder, "speech")


def speech_tars(folder: Path) -> Path:
    """Tars written by webdataset."""
    folder.mkdir()
    with webdataset.ShardWriter(f"{folder}/a-%06d.tar", maxcount=3, verbose=0) as writer:
        for i in range(6):
            wav = io.BytesIO()
            noise = np.random.default_rng(i).normal(0, 3000, 16_000 + i).astype(np.int16)
            soundfile.write(wav, noise, 16_000, format="WAV", subtype="PCM_16")
            writer.write({"__key__": f"clip{i}", "wav": wav.getvalue(), "json": {"i": i}})
    return folder


def test_the_loader_reads_plain_webdataset_tars(tmp_path: Path, cache: Path) -> None:
    found = find_set(speech_tars(tmp_path / "tars"), "speech")
    config = SpeechConfig(views=1, crop_seconds=1.0, min_seconds=0.5)
    with closing(Loader(found, Speech(config), seed=0, size=6, micro_batches=2)) as loader:
        batches = [b for step in islice(loader, loader.stats.steps) for b in step.micro_batches]
    assert sorted(key for b in batches for key in b.keys) == [f"clip{i}" for i in range(6)]


def test_tars_that_are_streamed_and_those_that_are_not() -> None:
    assert stream_tars("https://h/{a,b}-{08..10}.tar?x=1") == [
        f"https://h/{name}-{i}.tar?x=1" for name in "ab" for i in ("08", "09", "10")
    ]
    command = "pipe:tar c {x,y} | awk '{print $1, $2}' > /my\\ dir/a-{0..1}.tar"
    assert stream_tars(command)[3] == command.replace("{x,y}", "y").replace("{0..1}", "1")
    assert stream_tars("pipe:zcat a.tar.gz") == ["pipe:zcat a.tar.gz"]
    for other in ("https://h/set", "https://h/a.tar/set", "pipe:cat /sets/a.tar.d/{}", "/data/set"):
        assert stream_tars(other) == []
    with pytest.raises(UserError, match="is a local tar; give its folder instead"):
        find_set("/data/a-{000..127}.tar")
    with pytest.raises(UserError, match="without an index, which only training and"):
        find_set("https://h/a-{0..1}.tar", "speech")
