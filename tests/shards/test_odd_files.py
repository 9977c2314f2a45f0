"""Files that are no recordings, in folders and tars."""

from __future__ import annotations

import os
from pathlib import Path

from d2v_ds.data.checks import Finding
from d2v_ds.data.tar_index import index_tar
from d2v_ds.modalities import sample_formats
from shards.speech.folder import Folder
from shards.speech.webdataset import WebDataset
from tests.helpers.corpora import put, put_tar, recording


def test_hidden_members_and_tars_without_files(tmp_path: Path) -> None:
    """macOS stores `._NAME` next to NAME."""
    clip = recording()
    tar = put_tar(tmp_path / "in/a.tar", [("x/._a.wav", b"mac"), ("x/a.wav", clip), ("x/b", b"")])
    (tmp_path / "in/b.tar").write_bytes(bytes(10240))
    (tmp_path / "in/c.tar").write_bytes(b"")
    found: list[Finding] = []
    assert len(list(WebDataset.open(tmp_path / "in", None).samples(found))) == 1
    assert [(one.name, one.kind) for one in found] == [
        ("a.tar, x/._a.wav", "hidden"),
        ("a.tar, x/b", "unused"),
        ("b.tar", "empty"),
        ("c.tar", "empty"),
    ]
    [form] = [form for form in sample_formats() if form.modality == "speech"]
    indexed = index_tar((tar, form, "none"))
    assert indexed.entry.samples == 1 and not indexed.left_out
    assert [one.kind for one in indexed.notes] == ["hidden", "unused"]


def test_pipes_are_not_read(tmp_path: Path) -> None:
    put(tmp_path / "a.wav", recording())
    os.mkfifo(tmp_path / "b.wav")
    found: list[Finding] = []
    assert len(list(Folder.open(tmp_path, None).samples(found))) == 1
    assert [(one.name, one.kind) for one in found] == [("b.wav", "type")]
