"""--split of text: each document is in exactly one set, whatever the size of its file."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.cli import main
from shards.text import reading
from tests.helpers.corpora import put
from tests.shards.layout_corpora import put_parquet
from tests.shards.text_sets import MODEL, about, convert, documents, labelled

SPLIT = ["--split", "train=80,valid=20"]
NAMES = ("train", "valid")


def split_texts(out: Path) -> dict[str, list[str]]:
    return {name: documents(out / name) for name in NAMES}


def test_a_small_file_is_split_by_document(tmp_path: Path) -> None:
    texts = [f"document {i}" for i in range(300)]
    put(tmp_path / "a.txt", "\n".join(texts))
    assert convert(tmp_path / "a.txt", tmp_path / "out", *SPLIT, "--block", 16) == 0
    found = split_texts(tmp_path / "out")
    assert sorted(found["train"] + found["valid"]) == sorted(texts)
    assert 35 < len(found["valid"]) < 85
    counts = {name: about(tmp_path / "out" / name)["inputs"] for name in NAMES}
    assert counts == {name: len(texts) for name, texts in found.items()}
    for name in NAMES:
        assert main(["verify", str(tmp_path / "out" / name), "-j", "1"]) == 0


@pytest.mark.parametrize("document", ["line", "blank-line", "file"])
def test_documents_keep_their_split_when_the_corpus_grows(document: str, tmp_path: Path) -> None:
    for i in range(60):
        put(tmp_path / f"in/{i}.txt", f"text {i}\n\nmore {i}\n")
    arguments = [*SPLIT, "--document", document]
    assert convert(tmp_path / "in", tmp_path / "first", *arguments) == 0
    for i in range(60, 90):
        put(tmp_path / f"in/{i}.txt", f"text {i}\n\nmore {i}\n")
    assert convert(tmp_path / "in", tmp_path / "second", *arguments) == 0
    first, second = split_texts(tmp_path / "first"), split_texts(tmp_path / "second")
    number = 60 if document == "file" else 120
    assert len(first["train"] + first["valid"]) == number == len({*first["train"], *first["valid"]})
    for name in NAMES:
        assert set(first[name]) < set(second[name]) and first[name]
    # With one document per file, the other split's parts have none.
    assert sum(about(tmp_path / "first" / name)["inputs"] for name in NAMES) == number


@settings(max_examples=25, deadline=None)
@given(
    files=st.lists(st.lists(st.sampled_from(["good", "", "\xff", "\0"])), min_size=1, max_size=5),
    part=st.integers(5, 200),
)
def test_counts_of_splits_are_those_of_the_whole(
    files: list[list[str]], part: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Documents and inputs that are left out, by kind."""
    folder = tmp_path_factory.mktemp("splits")
    for i, lines in enumerate([["some text"] * 30, *files]):
        content = "\n".join(f"{line} {k}" if line else "" for k, line in enumerate(lines))
        put(folder / f"in/{i}.txt", content.encode("latin-1"))
    size, reading.PART = reading.PART, part
    try:
        for name, arguments in {"whole": [], "parted": ["--split", "a=50,b=50"]}.items():
            code = convert(folder / "in", folder / name, "--max-bad", "100%", *arguments)
            assert code == 0
    finally:
        reading.PART = size
    sets = [folder / "whole", folder / "parted/a", folder / "parted/b"]
    whole, a, b = (Counter(documents(each)) for each in sets)
    assert whole == a + b
    entries = [about(each) for each in sets]
    left_out = [Counter(each["left_out"]) for each in entries]
    assert left_out[0] == left_out[1] + left_out[2]
    for each, found in zip(entries, (whole, a, b), strict=True):
        assert each["inputs"] == found.total() + each["quarantined"]


def test_the_same_bytes_with_any_number_of_processes(tmp_path: Path) -> None:
    for i in range(4):
        put(tmp_path / f"in/{i}.txt", "".join(f"document {i} {k}\n" for k in range(2000)))
    for jobs in ("1", "2"):
        words = ["text", str(tmp_path / "in"), str(tmp_path / jobs), "--tokenizer", str(MODEL)]
        assert main([*words, *SPLIT, "--shard-size", "20KB", "-j", jobs]) == 0
    for name in NAMES:
        one, two = (
            {f.name: f.read_bytes() for f in (tmp_path / jobs / name).iterdir()}
            for jobs in ("1", "2")
        )
        assert one == two and len([f for f in one if f.endswith(".tar")]) >= 1


def test_a_split_without_documents(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(tmp_path / "a.txt", "only one\n")
    assert convert(tmp_path / "a.txt", tmp_path / "out", *SPLIT) == 2
    assert "--split: no document falls into 'valid'; increase its share" in capsys.readouterr().err


ROWS = [{"text": f"text {i}", "kind": f"k{i % 3}", "site": f"site {i % 20}"} for i in range(200)]


def write_rows(kind: str, folder: Path) -> Path:
    if kind == "parquet":
        columns = {key: [row[key] for row in ROWS] for key in ROWS[0]}
        return put_parquet(folder / "a.parquet", columns)
    if kind in ("csv", "tsv"):
        mark = "," if kind == "csv" else "\t"
        lines = [mark.join(row.values()) for row in [dict(zip(ROWS[0], ROWS[0])), *ROWS]]  # noqa: B905
        return put(folder / f"a.{kind}", "\n".join(lines) + "\n")
    rows = json.dumps(ROWS) if kind == "json" else "\n".join(map(json.dumps, ROWS))
    return put(folder / f"a.{kind}", rows)


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_split_by_a_column(kind: str, tmp_path: Path) -> None:
    source = write_rows(kind, tmp_path)
    arguments = ["--split", "a=50,b=50", "--split-by", "site"]
    assert convert(source, tmp_path / "out", "--label-key", "kind", *arguments) == 0
    a, b = (labelled(tmp_path / "out" / name) for name in "ab")
    assert len(a) + len(b) == 200 and a and b
    assert {row["site"] for row in a}.isdisjoint(row["site"] for row in b)
    assert convert(source, tmp_path / "packed", *arguments) == 0
    texts = [documents(tmp_path / "packed" / name) for name in "ab"]
    site = {row["text"]: row["site"] for row in ROWS}
    assert [{site[text] for text in each} for each in texts] == [
        {row["site"] for row in each} for each in (a, b)
    ]


def test_split_by_the_label_and_by_unknown_columns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_rows("jsonl", tmp_path)
    more = ["--split", "a=50,b=50", "--split-by"]
    assert convert(source, tmp_path / "out", "--label-key", "kind", *more, "kind") == 0
    a, b = ({row["label"] for row in labelled(tmp_path / "out" / name)} for name in "ab")
    assert a | b == {"k0", "k1", "k2"} and not a & b
    assert convert(source, tmp_path / "other", *more, "sit") == 2
    assert "has no 'sit'; did you mean 'site'?" in capsys.readouterr().err
    put(tmp_path / "plain/a.txt", "text\n")
    assert convert(tmp_path / "plain", tmp_path / "third", *more, "site") == 2
    assert "--split-by site: a.txt is plain text and has no columns" in capsys.readouterr().err
