"""The tokenizer of a text set is copied into the run folder, also from a remote set."""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from pathlib import Path

import pytest

from d2v_ds.data import download
from d2v_ds.data.shard_format import ShardSet
from d2v_ds.loader.tokenizer_file import keep_tokenizer
from tests.helpers.http_server import Server, start, stop


def text_set(root: Path) -> ShardSet:
    about = {"tokenizer": {"file": "tokenizer.model", "vocab_size": 9}}
    return ShardSet(root, "text", "tokens", 0, ("u16",), (), about=about)


def test_a_local_set(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shards, target = text_set(tmp_path), tmp_path / "kept.model"
    keep_tokenizer(dataclasses.replace(shards, about={}), target)
    assert not target.exists() and not caplog.records
    with caplog.at_level(logging.WARNING, "d2v_ds"):
        keep_tokenizer(shards, target)
        assert not target.exists()
        assert "has no tokenizer.model, which exports need" in caplog.text
        caplog.clear()
        (tmp_path / "tokenizer.model").write_bytes(b"first")
        keep_tokenizer(shards, target)
        keep_tokenizer(shards, target)
        assert target.read_bytes() == b"first" and not caplog.records
        (tmp_path / "tokenizer.model").write_bytes(b"second")
        keep_tokenizer(shards, target)
        assert target.read_bytes() == b"second" and "is replaced" in caplog.text


def test_a_remote_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(download, "PAUSE", 0.01)
    (tmp_path / "tokenizer.model").write_bytes(b"remote")
    state = Server("", Counter())
    server = start(state, tmp_path)
    url = f"http://127.0.0.1:{server.server_address[1]}"
    shards = dataclasses.replace(text_set(tmp_path / "cache"), remote=url)
    try:
        keep_tokenizer(shards, tmp_path / "kept.model")
        assert (tmp_path / "kept.model").read_bytes() == b"remote"
        (tmp_path / "tokenizer.model").unlink()
        with caplog.at_level(logging.WARNING, "d2v_ds"):
            keep_tokenizer(shards, tmp_path / "other.model")
        assert not (tmp_path / "other.model").exists() and "exports need" in caplog.text
    finally:
        stop(server)
