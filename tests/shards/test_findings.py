"""Every file of a corpus has an outcome: used, left out, passed over or altered, by name."""

from __future__ import annotations

import json
import os
import pickle
import re
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from d2v_ds.data import checks
from d2v_ds.data.checks import Finding
from d2v_ds.data.shard_format import open_set
from d2v_ds.errors import UserError
from d2v_ds.loader.loader import Loader
from d2v_ds.modalities.speech import Speech, SpeechConfig
from shards import findings, walking, writer
from shards.cli import main
from tests.helpers.corpora import notes, put, put_tar, quarantine, recording

ROOT = Path(__file__).parents[2]
OUTCOME_OF_TABLE = {
    "left out": checks.LEFT_OUT,
    "left out by an option": checks.UNWANTED,
    "passed over": checks.PASSED_OVER,
    "altered": checks.ALTERED,
}


def test_the_documented_kinds_are_all_kinds() -> None:
    text = (ROOT / "docs" / "corpora.md").read_text()
    text = text[text.index("| kind | outcome | meaning |") :]
    rows = re.findall(r"^\| ([a-z -]+) \| ([a-z ]+) \| (.+) \|$", text, re.MULTILINE)
    documented = [row for row in rows if row[1] in OUTCOME_OF_TABLE]
    assert documented == [
        (kind, outcome, meaning)
        for outcome, kinds in OUTCOME_OF_TABLE.items()
        for kind, meaning in kinds.items()
    ]


def test_counts_by_kind_and_extension() -> None:
    found = [
        Finding("a.AIFF", "", "type"),
        Finding("b/c.aiff", "", "type"),
        Finding("README", "", "type"),
        Finding(".x", "", "hidden"),
        Finding("d.wav", "is silent", "silent"),
        Finding("e.wav", "is short", "min-seconds"),
        Finding("f.wav", "was scaled", "scaled"),
    ]
    assert findings.counts(found) == {
        "left_out": {"silent": 1, "min-seconds": 1},
        "passed_over": {".aiff": 2, "without extension": 1, "hidden": 1},
        "altered": {"scaled": 1},
    }
    assert findings.unusable(found) == [found[4]]
    assert findings.left_out(found) == found[4:6]


def test_the_most_frequent_reasons_come_first() -> None:
    found = [Finding(f"{i}.wav", f"ends {i} bytes early", "truncated") for i in range(5)]
    found += [Finding(f"x{i}", reason) for i, reason in enumerate(("a", "a", "b", "c"))]
    assert findings.first_reasons(found) == (
        "5 x ends 0 bytes early (the first: 0.wav); 2 x a (the first: x0); 1 x b (x2); and 1 with "
        "other reasons"
    )


def test_numbers_in_names_are_not_masked() -> None:
    reason = "is not UTF-8 at its byte 12; use iconv -f LATIN1; samples from -1 to 1.5, not 3s"
    assert findings.masked(reason) == (
        "is not UTF-8 at its byte N; use iconv -f LATIN1; samples from -N to N, not Ns"
    )


def test_a_kind_that_does_not_exist_is_refused() -> None:
    assert findings.normalised([("a", "why")]) == [Finding("a", "why", "other")]
    with pytest.raises(AssertionError, match="'sad' is not a kind"):
        findings.normalised([Finding("a", "why", "sad")])


def test_an_unusable_sample_keeps_its_kind_between_processes() -> None:
    error = pickle.loads(pickle.dumps(checks.Unusable("silent", "is silent")))
    assert (str(error), error.kind) == ("is silent", "silent")
    assert checks.kind_of(ValueError("x")) == "other"
    assert checks.kind_of(FileNotFoundError("x")) == "unreadable"


# --------------------------------------------------------------------------------- walking a folder


def test_what_a_walk_does_not_read_is_reported(tmp_path: Path) -> None:
    for name in ("a/1.wav", "a/.hidden.wav", ".git/config", "out/speech-000000.idx"):
        put(tmp_path / "in" / name, b"x")
    put(tmp_path / "in/out/index.json", "{}")
    put(tmp_path / "outside/2.wav", b"x")
    (tmp_path / "in/b").symlink_to(tmp_path / "outside")
    (tmp_path / "in/c").symlink_to(tmp_path / "in" / "a")
    (tmp_path / "in/d").symlink_to(tmp_path / "in")
    found: list[Finding] = []
    assert [file.path for file in walking.walk(tmp_path / "in", found)] == ["a/1.wav", "b/2.wav"]
    assert {(name, kind) for name, _, kind in found} == {
        (".git", "hidden"),
        ("a/.hidden.wav", "hidden"),
        ("c", "linked twice"),
        ("d", "linked twice"),
        ("out", "shard set"),
    }


@pytest.mark.parametrize(
    ("family", "file"), [("speech", "1.wav"), ("images", "1.png"), ("text", "1.txt")]
)
def test_a_folder_that_cannot_be_read_is_an_error(
    family: str, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path / "in" / "open" / file, recording("wav"))
    put(tmp_path / "in" / "locked" / file, recording("wav"))
    scandir = os.scandir

    def refused(path: str) -> object:
        if os.fspath(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)  # file modes do not stop root
    with pytest.raises(UserError, match=r"locked: this folder cannot be read \(Permission denied"):
        list(walking.walk(tmp_path / "in"))
    model = str(ROOT / "shards" / "samples" / "text" / "tokenizer.model")
    more = ["--tokenizer", model] if family == "text" else []
    assert main([family, str(tmp_path / "in"), str(tmp_path / "out"), "-j1", *more]) == 2
    assert not (tmp_path / "out").exists()


def test_a_list_that_cannot_be_read_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put(tmp_path / "a.wav", recording("wav"))
    file = put(tmp_path / "list.jsonl", '{"path": "a.wav"}\n')
    opened = Path.open

    def refused(path: Path, *mode: Any, **more: Any) -> Any:
        if path == file:
            raise PermissionError(13, "Permission denied", str(file))
        return opened(path, *mode, **more)

    monkeypatch.setattr(Path, "open", refused)  # file modes do not stop root
    assert main(["speech", str(file), str(tmp_path / "out"), "-j1"]) == 2
    line = f"d2v-shards: {file}: Permission denied; correct the permissions\n"
    assert capsys.readouterr().err == line


@pytest.mark.parametrize("family", ["text", "speech"])
def test_a_conversion_within_its_source_resumes(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan and the tar of the interrupted conversion have names of inputs."""
    words = [family, str(tmp_path), str(tmp_path / "out"), "-j1"]
    if family == "text":
        put(tmp_path / "a.json", '[{"text": "one"}, {"text": "two"}]')
        words += ["--tokenizer", str(ROOT / "shards" / "samples" / "text" / "tokenizer.model")]
    else:
        put_tar(tmp_path / "a.tar", [("a.wav", recording("wav"))])

    def full(path: Path, data: bytes) -> None:  # after the tar, before its index
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(writer, "write_atomically", full)
        assert main(words) == 2
    assert [file.name for file in (tmp_path / "out").glob("*.tar")] == [f"{family}-000000.tar"]
    assert main(words) == 0
    assert not quarantine(tmp_path / "out")
    assert not notes(tmp_path / "out"), "as without the interruption"


def test_the_lists_and_counts_of_a_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(tmp_path / "in/a.wav", recording("wav"))
    put(tmp_path / "in/b.wav", b"RIFF")
    put(tmp_path / "in/c.docx", b"x")
    put(tmp_path / "in/D", b"x")
    put(tmp_path / "in/.e.wav", recording("wav"))
    out = tmp_path / "out"
    assert main(["speech", str(tmp_path / "in"), str(out), "-j1", "--max-bad", "50%"]) == 0
    printed = capsys.readouterr().out
    assert "1 of 2 inputs were left out (1 " in printed and str(out / "quarantine.jsonl") in printed
    assert "3 files were passed over (1 hidden, 1 without extension, 1 .docx)" in printed
    assert set(quarantine(out)) == {"b.wav"}
    assert notes(out) == {".e.wav": "hidden", "D": "type", "c.docx": "type"}
    about = json.loads((out / "index.json").read_text())
    assert about["passed_over"] == {"hidden": 1, "without extension": 1, ".docx": 1}
    assert sum(about["left_out"].values()) == about["quarantined"] == 1
    found = checks.summary(about)
    kind, passed = *about["left_out"], "3 passed over (1 hidden, 1 without extension, 1 .docx)"
    assert found == f"conversion: 1 left out (1 {kind}), {passed}"
    config = SpeechConfig(min_seconds=0.1, crop_seconds=0.1)
    loader = Loader(open_set(out), Speech(config), seed=0, size=1, micro_batches=1, rank=0, world=1)
    with closing(loader):
        assert loader.describe().endswith(f"; {found}")
    assert main(["verify", str(out)]) == 0
    assert f"note: {found}\n" in capsys.readouterr().out
    assert main(["stats", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "Passed over\n  hidden             1\n  without extension  1\n  .docx" in shown
