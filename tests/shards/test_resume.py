"""What a conversion reads back: a damaged report costs its shard again, not the conversion."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from d2v_ds.data.shard_format import INDEX_FILE, PLAN_FILE
from shards import core, resume, samples
from shards.cli import main

SOURCE = samples.path("speech") / "unseen.tsv"
Damage = Callable[[dict[str, Any]], Any]


def convert(out: Path) -> int:
    return main(["speech", str(SOURCE), str(out), "--shard-size", "200KB", "-j1"])


@pytest.fixture
def unfinished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A conversion that was killed when all its shards had been written."""

    def die(*given: object) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "set"
    with monkeypatch.context() as patch:
        patch.setattr(core, "_finish", die)
        assert convert(out) == 130
    assert (out / PLAN_FILE).exists() and (out / "speech-000000.json").exists()
    return out


def hashes(folder: Path) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.iterdir()}


DAMAGES: dict[str, Damage] = {
    "empty": lambda report: b"",
    "half": lambda report: json.dumps(report).encode()[:40],
    "deep": lambda report: b"[" * 100_000,
    "list": lambda report: [report],
    "other shard": lambda report: {**report, "entry": {**report["entry"], "name": "../x"}},
    "no number": lambda report: {**report, "entry": {**report["entry"], "samples": "3"}},
    "no findings": lambda report: {**report, "findings": None},
    "other kind": lambda report: {**report, "findings": [["a", "b", "c"]]},
    "no hash": lambda report: {**report, "entry": {**report["entry"], "sha256": ""}},
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_report(
    unfinished: Path,
    tmp_path: Path,
    damage: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(resume.log, "propagate", True)
    assert convert(tmp_path / "whole") == 0
    file = unfinished / "speech-000001.json"
    broken = DAMAGES[damage](json.loads(file.read_bytes()))
    file.write_bytes(broken if isinstance(broken, bytes) else json.dumps(broken).encode())
    assert convert(unfinished) == 0
    assert hashes(unfinished) == hashes(tmp_path / "whole")
    assert "speech-000001.json: is damaged" in caplog.text
    assert "its shard is converted again" in caplog.text


@pytest.mark.parametrize("key", ["shards", "findings", "modality", "fields", "options", "about"])
def test_a_damaged_plan(unfinished: Path, key: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = unfinished / PLAN_FILE
    whole = json.loads(file.read_bytes())
    for value in (None, -1, resume.MOST_SHARDS + 1, "../x", ["x", 3]):
        file.write_text(json.dumps({**whole, key: value}))
        assert main(["merge", str(unfinished)]) == 2
        error = capsys.readouterr().err
        assert f"{file}: is damaged" in error and "use another folder or delete" in error


@pytest.mark.parametrize("name", [PLAN_FILE, INDEX_FILE])
@pytest.mark.parametrize("content", [b"", b"[]", b"[" * 100_000, b'{"format": 1, "modality": 3}'])
def test_a_folder_that_cannot_be_continued(
    tmp_path: Path, name: str, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "set"
    out.mkdir()
    (out / name).write_bytes(content)
    assert convert(out) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and str(out) in error[0] and "another folder or delete" in error[0]
