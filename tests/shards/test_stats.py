"""d2v-shards stats: the description of a set."""

from __future__ import annotations

from pathlib import Path

import pytest

from d2v_ds.data.shard_format import open_set
from shards.cli import main
from tests.shards.speech_sets import build


def test_stats(sound: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stats", str(sound)]) == 0
    text = capsys.readouterr().out
    rows = [line.split() for line in text.splitlines()]
    assert ["samples", "50"] in rows and ["sample", "rate", "16000", "Hz"] in rows
    hours = open_set(sound).length / 16_000 / 3600
    assert ["hours", f"{hours:.3f}"] in rows
    assert ["george", "10"] in rows and ["7", "5"] in rows
    bins = text.split("Length in s")[1].split("\n\n")[0].splitlines()[4:]
    assert len(bins) == 10 and sum(int(line.split()[3]) for line in bins) == 50


def test_stats_markdown(sound: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stats", "--markdown", str(sound)]) == 0
    text = capsys.readouterr().out
    assert "## speaker\n\n| | |\n|---|---|\n| george | 10 |" in text


def test_stats_of_long_columns_and_damage(
    flac: tuple[bytes, int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, frames = flac
    rows = [(f"k{i}", data, b'{"text": "%d"}' % i, frames) for i in range(60)]
    assert main(["stats", str(build(tmp_path / "set", [rows]))]) == 0
    assert "distinct values  more than 50" in capsys.readouterr().out
    assert main(["stats", str(build(tmp_path / "bad", [[("a", data, b"{", frames)]]))]) == 2
    assert "sample 'a': its .json is damaged" in capsys.readouterr().err
