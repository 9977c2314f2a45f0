"""d2v-shards text: pairs of texts, and tables of tab-separated values."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from d2v_ds.data.shard_format import open_set
from d2v_ds.loader.reading import read_samples
from d2v_ds.modalities.text import read_ids
from shards.cli import main
from shards.text import reading
from tests.helpers.corpora import quarantine
from tests.shards.text_sets import TOKENIZER, convert

EOS = TOKENIZER.eos_id
PAIRS = [
    ("A man is walking.", "Somebody walks \u2014 slowly.", 3.8, "captions"),
    ('He said "no".', "Nothing\u2581was said", 0.0, "news"),
    ("One.", "Two.", 5.0, "forum"),
]
KEYS = ["--text-key", "a", "--pair-key", "b", "--label-key", "score"]


def packed(a: str, b: str) -> list[int]:
    """RoBERTa's ids of a pair, without the first <s>."""
    return [*TOKENIZER.encode(a), EOS, EOS, *TOKENIZER.encode(b), EOS]


def content(out: Path) -> list[tuple[list[int], dict[str, Any]]]:
    shards = open_set(out, "text")
    assert shards.fields == ("json", "npy")
    return [
        (read_ids(sample).tolist(), json.loads(sample["json"]))
        for _, sample in read_samples(shards, ("npy", "json"))
    ]


def write_jsonl(folder: Path) -> Path:
    rows = [dict(zip(("a", "b", "score", "genre"), row, strict=True)) for row in PAIRS]
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_parquet(folder: Path) -> Path:
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    columns = dict(zip(("a", "b", "score", "genre"), zip(*PAIRS, strict=True), strict=True))
    parquet.write_table(pa.table({k: list(v) for k, v in columns.items()}), folder / "p.parquet")
    return folder / "p.parquet"


@pytest.mark.parametrize("write", [write_jsonl, write_parquet])
def test_pairs_are_packed_as_roberta_does(
    write: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert convert(write(tmp_path), out, *KEYS) == 0
    found = content(out)
    assert [ids for ids, _ in found] == [packed(a, b) for a, b, _, _ in PAIRS]
    for (_, meta), (_, _, score, genre) in zip(found, PAIRS, strict=True):
        assert meta.pop("path") and meta == {"label": score, "genre": genre}
        assert isinstance(meta["label"], float)
    assert open_set(out).length == sum(len(ids) for ids, _ in found)
    assert main(["verify", str(out)]) == 0
    capsys.readouterr()
    assert main(["stats", str(out)]) == 0
    assert "captions" in capsys.readouterr().out
    about = json.loads((out / "index.json").read_bytes())
    assert about["options"]["pair-key"] == "b" and about["options"]["label-key"] == "score"


def test_a_pair_lacks_a_text(tmp_path: Path) -> None:
    rows = [
        {"a": "x", "b": "y", "score": 1},
        {"a": "x", "b": "", "score": 1},
        {"a": "", "b": "y", "score": 1},
        {"a": "x", "b": 3, "score": 1},
        {"a": "x", "score": 1},
    ]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert convert(tmp_path / "p.jsonl", tmp_path / "out", *KEYS, "--max-bad", "90%") == 0
    assert [ids for ids, _ in content(tmp_path / "out")] == [packed("x", "y")]
    assert sorted(quarantine(tmp_path / "out").values()) == [
        "'b' is not text but int",
        "contains no text",
        "contains no text",
        "has no 'b' (allowed: a, score)",
    ]


def test_pairs_need_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert(write_jsonl(tmp_path), tmp_path / "out", "--pair-key", "b") == 2
    assert "--pair-key needs --label-key" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------- tables


def lines(header: bool = True) -> list[str]:
    rows = [f"{i}\t{a}\t{b}\t{score}" for i, (a, b, score, _) in enumerate(PAIRS)]
    return ["index\ta\tb\tscore"] * header + rows


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("packer", ["", ".gz"])
def test_a_table_with_a_header(tmp_path: Path, packer: str, end: str) -> None:
    path = tmp_path / f"train.tsv{packer}"
    data = "\ufeff".encode() + "".join(line + end for line in lines()).encode()
    path.write_bytes(gzip.compress(data) if packer else data)
    assert convert(path, tmp_path / "out", *KEYS) == 0
    found = content(tmp_path / "out")
    assert [ids for ids, _ in found] == [packed(a, b) for a, b, _, _ in PAIRS]
    assert [meta["label"] for _, meta in found] == ["3.8", "0.0", "5.0"]
    assert [meta["index"] for _, meta in found] == ["0", "1", "2"]


def test_a_table_without_a_header(tmp_path: Path) -> None:
    """As CoLA: single sentences in the last of four columns."""
    path = tmp_path / "train.tsv"
    path.write_text("gj04\t1\t\tThe sailors rode.\ngj04\t0\t*\tThey drank the pub.\n")
    keys = ["--columns", "source,label,mark,sentence", "--text-key", "sentence"]
    assert convert(path, tmp_path / "out", *keys, "--label-key", "label") == 0
    found = content(tmp_path / "out")
    assert [TOKENIZER.decode(ids[:-1]) for ids, _ in found] == [
        "The sailors rode.",
        "They drank the pub.",
    ]
    assert [meta["label"] for _, meta in found] == ["1", "0"]


def test_every_part_of_a_large_table_knows_the_header(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "PART", 100)
    path = tmp_path / "train.tsv"
    path.write_text("text\tlabel\n" + "".join(f"number {i}\t{i}\n" for i in range(60)))
    assert convert(path, tmp_path / "out", "--label-key", "label") == 0
    found = [(meta["label"], ids) for ids, meta in content(tmp_path / "out")]
    texts = {label: TOKENIZER.decode(ids[:-1]) for label, ids in found}
    assert len(found) == 60 and texts == {str(i): f"number {i}" for i in range(60)}


def test_damaged_rows_and_unknown_columns(tmp_path: Path) -> None:
    path = tmp_path / "train.tsv"
    path.write_text("\n".join([*lines(), "4\tonly\ttwo"]) + "\n")
    assert convert(path, tmp_path / "out", *KEYS, "--max-bad", "50%") == 0
    assert len(content(tmp_path / "out")) == 3
    [reason] = quarantine(tmp_path / "out").values()
    assert reason == "has 3 columns, expected 4"
    keys = ["--text-key", "a", "--label-key", "scoer", "--max-bad", "100%"]
    assert convert(path, tmp_path / "unknown", *keys) != 0


def test_tables_beside_texts_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.txt").write_text("a text\n")
    (tmp_path / "in/about.tsv").write_text("name\tlicence\n")
    assert convert(tmp_path / "in", tmp_path / "out") == 0
    assert open_set(tmp_path / "out").samples == 1
    assert not (tmp_path / "out/quarantine.jsonl").exists() or not quarantine(tmp_path / "out")
