"""The embedded corpora: small, whole, split without overlap, and made by the script beside them."""

from __future__ import annotations

from pathlib import Path

import pytest
import soundfile

from d2v_ds import audio
from shards import samples
from shards.samples import make_speech

SPEECH = samples.path("speech")


def rows(split: str) -> list[list[str]]:
    header, *lines = (SPEECH / f"{split}.tsv").read_text().splitlines()
    assert header.split("\t") == ["path", "label", "speaker"]
    return [line.split("\t") for line in lines]


def test_size_and_licence() -> None:
    size = sum(f.stat().st_size for f in SPEECH.rglob("*") if f.is_file())
    assert size <= make_speech.LIMIT <= 2_000_000
    readme = (SPEECH / "README.md").read_text()
    assert "CC BY-SA 4.0" in readme and "Zohar Jackson" in readme


def test_splits_do_not_overlap() -> None:
    paths = {split: {row[0] for row in rows(split)} for split in ("train", "seen", "unseen")}
    everything = [path for split in paths for path in paths[split]]
    assert len(set(everything)) == len(everything) == 630
    assert set(everything) == {f"recordings/{f.name}" for f in (SPEECH / "recordings").iterdir()}
    speakers = {split: {row[2] for row in rows(split)} for split in paths}
    assert speakers["train"] == speakers["seen"] and len(speakers["train"]) == 5
    assert speakers["unseen"] == {"theo"} and "theo" not in speakers["train"]


def test_labels() -> None:
    for split, each in (("seen", 5), ("unseen", 10)):
        labels = [row[1] for row in rows(split)]
        assert {label: labels.count(label) for label in labels} == {str(d): each for d in range(10)}
    for path, label, speaker in rows("train"):
        assert Path(path).name.startswith(f"{label}_{speaker}_")


def test_recordings_are_made_by_the_script(tmp_path: Path) -> None:
    source = tmp_path / "fsdd/recordings"
    source.mkdir(parents=True)
    for file in (SPEECH / "recordings").iterdir():
        data, rate = soundfile.read(file, dtype="int16")
        assert rate == 8000 and data.ndim == 1
        soundfile.write(source / f"{file.stem}.wav", data, rate, subtype="PCM_16")
    make_speech.make(source.parent, tmp_path / "made")
    for split in ("train", "seen", "unseen"):
        name = f"{split}.tsv"
        assert (tmp_path / "made" / name).read_bytes() == (SPEECH / name).read_bytes()
    for file in (SPEECH / "recordings").iterdir():
        made = audio.decode(tmp_path / "made/recordings" / file.name)
        assert (made == audio.decode(file)).all()


def test_unknown_corpus() -> None:
    with pytest.raises(AssertionError, match="no embedded corpus 'music'"):
        samples.path("music")
