"""Files that are no recordings, in folders."""

from __future__ import annotations

import os
from pathlib import Path

from d2v_ds.data.checks import Finding
from shards.speech.folder import Folder
from tests.helpers.corpora import put, recording


def test_pipes_are_not_read(tmp_path: Path) -> None:
    put(tmp_path / "a.wav", recording())
    os.mkfifo(tmp_path / "b.wav")
    found: list[Finding] = []
    assert len(list(Folder.open(tmp_path, None).samples(found))) == 1
    assert [(one.name, one.kind) for one in found] == [("b.wav", "type")]
