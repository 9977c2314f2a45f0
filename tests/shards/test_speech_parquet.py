"""Parquet with recordings, as the datasets library of Hugging Face stores them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shards.cli import main
from shards.speech.parquet import Parquet
from tests.helpers.corpora import contents, found, put, recording
from tests.shards.layout_corpora import put_parquet

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def put_features(
    path: Path, columns: dict[str, Any], names: dict[str, list[str]], rows: int = 100
) -> Path:
    """names: {column: names of its classes}."""
    features: dict[str, Any] = {"audio": {"_type": "Audio"}}
    features |= {name: {"names": each, "_type": "ClassLabel"} for name, each in names.items()}
    about = {"huggingface": json.dumps({"info": {"features": features}})}
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns).replace_schema_metadata(about), path, row_group_size=rows)
    return path


def cells(*seeds: int) -> list[dict[str, Any]]:
    return [{"bytes": recording(seconds=0.05, seed=i), "path": f"{i}.wav"} for i in seeds]


def run(*words: object) -> int:
    return main(["speech", *map(str, words), "-j1"])


def test_a_folder_with_splits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The names of classes are those of each file."""
    source = tmp_path / "minds14"
    first = {"audio": cells(0, 1, 2), "label": [0, 1, -1], "text": ["a", "b", None], "n": [1, 2, 3]}
    put_features(source / "data/train-00000-of-00002.parquet", first, {"label": ["yes", "no"]}, 2)
    second = {"audio": cells(3, 4), "label": [0, 1]}
    put_features(source / "data/train-00001-of-00002.parquet", second, {"label": ["no", "yes"]})
    put_features(source / "data/validation-00000-of-00001.parquet", {"audio": cells(5)}, {})
    put(source / "README.md", "about")
    out = tmp_path / "out"
    assert run(source, out) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{source}: layout parquet",
        "the inputs belong to several splits (5 train, 1 validation), which are not kept apart; to "
        "convert only one, choose its files, for example with --only '**/*train*'",
        f"{out}: 6 samples, 0.000 hours, 1 shard",
        f"1 file was passed over (1 .md); the list is in {out / 'notes.jsonl'}",
        f"1 input was altered (1 no metadata); the list is in {out / 'notes.jsonl'}",
    ]
    rows = {key: row["json"] for key, row in contents(out).items()}
    one, two = "data/train-00000-of-00002", "data/train-00001-of-00002"
    labels = {key: row.get("label") for key, row in rows.items()}
    assert labels == {
        f"{one}-0@0000": "yes",
        f"{one}-0@0001": "no",
        f"{one}-1@0002": None,
        f"{two}-0@0000": "no",
        f"{two}-0@0001": "yes",
        "data/validation-00000-of-00001-0@0000": None,
    }
    assert rows[f"{one}-0@0001"]["text"] == "b" and rows[f"{one}-1@0002"]["n"] == 3
    assert rows[f"{one}-0@0000"]["paths"] == [f"{one}.parquet, row 0"]
    assert json.loads((out / "index.json").read_bytes())["inputs"] == 6
    assert main(["verify", str(out), "-j1"]) == 0
    capsys.readouterr()
    assert run(source, tmp_path / "train", "--only", "**/*train*") == 0
    text = capsys.readouterr().out
    assert "several splits" not in text and "1 input was not chosen" in text
    assert len(contents(tmp_path / "train")) == 5


@pytest.mark.parametrize("kind", ["struct", "path only", "binary", "text path"])
def test_ways_to_store_recordings(kind: str, tmp_path: Path) -> None:
    data = recording(seconds=0.05)
    put(tmp_path / "in/wavs/0.flac", data)
    cell: Any = {"bytes": data, "path": None}
    if kind == "path only":
        cell = {"bytes": None, "path": "wavs/0.flac"}
    elif kind != "struct":
        cell = data if kind == "binary" else "wavs/0.flac"
    put_parquet(tmp_path / "in/a.parquet", {"id": ["x"], "audio": [cell]})
    assert run(tmp_path / "in/a.parquet", tmp_path / "out") == 0
    [(key, row)] = contents(tmp_path / "out").items()
    assert key == "a-0@0000" and row["json"]["id"] == "x" and row["json"]["duration"] == 0.05


def test_rows_and_files_that_cannot_be_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [*cells(0), {"bytes": b"no sound", "path": "b"}, {"bytes": None, "path": None}]
    rows += [None, {"bytes": None, "path": "gone.wav"}, *cells(5)]
    rows += cells(6)
    columns = {"audio": rows, "label": [0, 0, 0, 0, 0, 7, None]}
    put_features(tmp_path / "in/a.parquet", columns, {"label": ["x", "y"]})
    put(tmp_path / "in/b.parquet", b"PAR1 damaged")
    put_parquet(tmp_path / "in/c.parquet", {"other": [1]})
    out = tmp_path / "out"
    assert run(tmp_path / "in", out, "--max-bad", "1") == 0
    assert len(contents(out)) == 3
    kinds = {name: kind for name, (_, kind) in found(out, "quarantine.jsonl").items()}
    kinds.pop("a.parquet, row 1")  # whatever the decoder says
    assert kinds == {
        "a.parquet, row 2": "empty",
        "a.parquet, row 3": "empty",
        "a.parquet, row 4": "unreadable",
        "b.parquet": "damaged",
        "c.parquet, 0 to 1": "row",
    }
    assert found(out, "notes.jsonl") == {
        "a.parquet, row 5": (
            "its label is 7, not one of the 2 classes: kept without it",
            "no metadata",
        ),
        "a.parquet, row 6": ("has no label (None): kept without it", "no metadata"),
    }
    assert json.loads((out / "index.json").read_bytes())["inputs"] == 9
    capsys.readouterr()
    assert run(tmp_path / "in/c.parquet", tmp_path / "no") == 2
    line = capsys.readouterr().err
    assert "has no column with recordings, such as `audio` (columns: other)" in line


@pytest.mark.parametrize(
    "words", [("--join", "speaker"), ("--split", "a=1,b=1", "--split-by", "n")]
)
def test_options_that_need_columns_are_refused(
    words: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put_parquet(tmp_path / "a.parquet", {"audio": cells(0), "speaker": ["x"], "n": [1]})
    assert run(tmp_path / "a.parquet", tmp_path / "out", *words) == 2
    assert (
        "is Parquet, whose columns are only read during the conversion" in capsys.readouterr().err
    )


def test_a_folder_of_recordings_beside_a_table_is_no_parquet_corpus(tmp_path: Path) -> None:
    put_parquet(tmp_path / "a.parquet", {"audio": ["0.wav"]})
    assert Parquet.recognises(tmp_path)
    put(tmp_path / "0.wav", recording())
    assert not Parquet.recognises(tmp_path)
