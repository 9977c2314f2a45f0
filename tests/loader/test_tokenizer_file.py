"""The tokenizer of a text set is copied into the run folder, also from a remote set."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections import Counter
from pathlib import Path

import pytest

from d2v_ds.data import download
from d2v_ds.data.shard_format import ShardSet
from d2v_ds.errors import UserError
from d2v_ds.loader.tokenizer_file import keep_tokenizer, refuse_mixed, refuse_other
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


def hashed(root: Path, content: bytes) -> ShardSet:
    about = {"tokenizer": {"sha256": hashlib.sha256(content).hexdigest()}}
    return dataclasses.replace(text_set(root), about=about)


def test_the_sets_of_a_run_have_one_tokenizer() -> None:
    first, same, other = (
        hashed(Path(name), content)
        for name, content in {"a": b"first", "b": b"first", "c": b"other"}.items()
    )
    unknown = text_set(Path("d"))
    refuse_mixed([])
    refuse_mixed([unknown, first, same])
    with pytest.raises(UserError, match=r"c was converted with another tokenizer than a; convert"):
        refuse_mixed([unknown, first, same, other])


def test_the_tokenizer_of_weights(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = tmp_path / "tokenizer.model"
    model.write_bytes(b"first")
    files, same, other = {model.name: model}, hashed(Path("a"), b"first"), hashed(Path("b"), b"no")
    with caplog.at_level(logging.WARNING, "d2v_ds"):
        refuse_other(Path("runs/first"), files, [same])
        assert not caplog.records
        with pytest.raises(UserError, match=r"runs/first was trained with another .* of b; conv"):
            refuse_other(Path("runs/first"), files, [same, other])
        refuse_other(Path("runs/first"), files, [text_set(Path("c"))])
        assert "c has no tokenizer.model" in caplog.text
        refuse_other(Path("roberta"), {}, [same])
        assert "init: roberta has no tokenizer.model" in caplog.text
