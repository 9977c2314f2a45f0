"""--max-bad is a share of the inputs of a set, whatever shard or task the bad ones are in."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from d2v_ds.data.shard_format import open_set
from shards import samples
from shards.cli import main
from tests.helpers.corpora import put, quarantine, recording
from tests.shards.pictures import picture

TEXT = ["--tokenizer", str(samples.path("text") / "tokenizer.model"), "-j1"]
FILES = 200


def run(family: str, *arguments: object) -> int:
    return main([family, *map(str, arguments)])


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 recordings, and a row that lists one of them again."""
    folder = tmp_path_factory.mktemp("corpus")
    names = [f"{i:03d}.wav" for i in range(FILES)]
    for i, name in enumerate(names):
        put(folder / name, recording(seed=i))
    return put(folder / "list.tsv", "\n".join(["path", *names, names[0]]) + "\n")


def test_what_the_plan_finds_does_not_stop_a_task(manifest: Path, tmp_path: Path) -> None:
    """The row is more than 1 % of the inputs of a task, but not of the set."""
    out = tmp_path / "out"
    for i in range(8):
        words = ["--shard-size", "50KB", "--task", f"{i}/8", "-j1"]
        assert run("speech", manifest, out, *words) == 0
    assert main(["merge", str(out)]) == 0
    assert open_set(out).samples == FILES and len(quarantine(out)) == 1


def test_what_the_plan_finds_is_listed_in_the_largest_split(manifest: Path, tmp_path: Path) -> None:
    """The row is more than 1 % of the inputs of the first split."""
    assert run("speech", manifest, tmp_path, "--split", "valid=5,train=95", "-j1") == 0
    assert len(quarantine(tmp_path / "train")) == 1 and not quarantine(tmp_path / "valid")


def test_the_parts_of_a_divided_recording_count(tmp_path: Path) -> None:
    """One of the 20 parts of two recordings is silent: 5 % of all inputs, but 10 % of the parts of
    that recording."""
    part, silence = recording(seconds=1), np.zeros(16_000, np.int16)
    noise = soundfile.read(io.BytesIO(part), dtype="int16")[0]
    for name, parts in (("a", [silence, *[noise] * 9]), ("b", [noise] * 10)):
        file = io.BytesIO()
        soundfile.write(file, np.concatenate(parts), 16_000, format="WAV")
        put(tmp_path / f"in/{name}.wav", file.getvalue())
    words = ["--max-seconds", "1", "--shard-size", "10KB", "-j1", "--max-bad"]
    assert run("speech", tmp_path / "in", tmp_path / "out", *words, "5%") == 0
    about = json.loads((tmp_path / "out/index.json").read_text())
    assert (about["inputs"], about["quarantined"]) == (20, 1) and len(about["shards"]) == 2
    assert open_set(tmp_path / "out").samples == 19
    assert run("speech", tmp_path / "in", tmp_path / "few", *words, "4%") == 2


def test_the_documents_of_later_shards_count_too(tmp_path: Path) -> None:
    """While shards of text are written, the number of documents is not known yet: one bad file of
    ten must not stop the conversion, whatever shard it is in."""
    for bad in range(10):
        folder = tmp_path / f"in{bad}"
        for i in range(10):
            content = "".join(f"document {j} of file {i}\n" for j in range(100))
            put(folder / f"{i}.txt", content.encode("utf-16" if i == bad else "utf-8"))
        out = tmp_path / f"out{bad}"
        assert run("text", folder, out, "--shard-size", "2KB", *TEXT) == 0
        assert list(quarantine(out)) == [f"{bad}.txt"]
    for i in range(3):
        words = ["--shard-size", "2KB", "--task", f"{i}/3", *TEXT]
        assert run("text", tmp_path / "in0", tmp_path / "tasks", *words) == 0
    assert main(["merge", str(tmp_path / "tasks")]) == 0


def test_the_border(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(9):
        put(tmp_path / "in" / f"{i}.wav", recording(seed=i))
    put(tmp_path / "in/bad.wav", b"not a recording")
    out = tmp_path / "out"
    assert run("speech", tmp_path / "in", out, "--max-bad", "9.99%") == 2
    assert "1 of 10 inputs cannot be used, more than --max-bad 9.990%" in capsys.readouterr().err
    assert run("speech", tmp_path / "in", out, "--max-bad", "10%") == 0
    assert open_set(out).samples == 9


@pytest.mark.parametrize("family", ["speech", "images"])
def test_rows_without_content_are_inputs(family: str, tmp_path: Path) -> None:
    """--max-bad is a share of the rows, not of the usable ones."""
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    column, make = ("audio", recording) if family == "speech" else ("image", picture)
    rows = [{"bytes": make(seed=i), "path": None} for i in range(8)]
    rows += [{"bytes": None, "path": None}, {"bytes": b"damaged", "path": None}]
    parquet.write_table(arrow.table({column: rows}), tmp_path / "train.parquet")
    assert run(family, tmp_path / "train.parquet", tmp_path / "out", "--max-bad", "20%") == 0
    about = open_set(tmp_path / "out").about
    assert (about["samples"], about["quarantined"], about["inputs"]) == (8, 2, 10)
