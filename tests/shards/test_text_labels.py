"""Labelled text of every format: tables, arrays, unusable labels. The labels equal those that the
datasets library reads, where it is installed."""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.corpora import put
from tests.shards.layout_corpora import put_parquet
from tests.shards.text_sets import about, convert, documents, found_in, labelled, open_text, read

KINDS = ["jsonl", "json", "csv", "tsv", "parquet"]
TEXTS = [
    'quoted "words", twice',
    "a 'single' one",
    "東京 é",
    "x\\ty",
    "line\u2028end",
    "#no comment",
]


def write_rows(kind: str, folder: Path, columns: dict[str, list[Any]]) -> Path:
    """A file with these columns."""
    rows = [
        dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
    ]
    file = folder / f"a.{kind}"
    if kind == "parquet":
        return put_parquet(file, columns)
    if kind == "json":
        return put(file, json.dumps(rows, indent=1))
    if kind == "jsonl":
        return put(file, "".join(json.dumps(row) + "\n" for row in rows))
    if kind == "tsv":
        lines = [list(columns), *([str(value) for value in row.values()] for row in rows)]
        return put(file, "".join("\t".join(line) + "\n" for line in lines))
    return put(file, csv_bytes([list(columns), *(list(row.values()) for row in rows)]))


def csv_bytes(rows: list[list[Any]], end: str = "\r\n") -> bytes:
    buffer = io.StringIO(newline="")
    csv.writer(buffer, lineterminator=end).writerows(rows)
    return buffer.getvalue().encode()


# ------------------------------------------------------------------------------------- the labels


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "labels",
    [["b", "a", "c", "a", "b", "B"], [3, 0, 1, 1, 2, 0], [0.5, 1.25, -3.0, 1e-3, 2.0, 0.0]],
)
def test_labels_equal_those_of_the_datasets_library(
    kind: str, labels: list[Any], tmp_path: Path
) -> None:
    datasets = pytest.importorskip("datasets", reason="the datasets library is not installed")
    source = write_rows(kind, tmp_path / "in", {"text": TEXTS, "kind": labels, "n": [*"abcdef"]})
    options = {"sep": "\t", "quoting": csv.QUOTE_NONE} if kind == "tsv" else {}
    builder = {"jsonl": "json", "tsv": "csv"}.get(kind, kind)
    datasets.disable_progress_bars()
    theirs = datasets.load_dataset(
        builder, data_files=str(source), split="train", cache_dir=str(tmp_path / "cache"), **options
    )
    arguments = ["--label-key", "kind", "--text-key", "text"]
    assert convert(source, tmp_path / "out", *arguments) == 0
    ours = [row["label"] for row in labelled(tmp_path / "out")]
    if isinstance(labels[0], str):
        assert ours == list(theirs["kind"])
    else:  # numbers of tables are stored as text
        assert [float(label) for label in ours] == [float(label) for label in theirs["kind"]]
    texts, findings = read(open_text(source, label_key="kind"))
    assert (texts, findings) == (list(theirs["text"]), [])


@pytest.mark.parametrize("kind", KINDS)
def test_text_and_columns_of_every_kind(kind: str, tmp_path: Path) -> None:
    source = write_rows(kind, tmp_path, {"text": TEXTS, "kind": [*"ababab"], "more": [*"cdefgh"]})
    assert convert(source, tmp_path / "out", "--label-key", "kind") == 0
    rows = labelled(tmp_path / "out")
    assert [(row["label"], row["more"]) for row in rows] == list(
        zip("ababab", "cdefgh", strict=True)
    )
    assert all(row["path"].startswith(source.name + ", ") for row in rows)
    assert read(open_text(source, label_key="kind")) == (TEXTS, [])
    assert convert(source, tmp_path / "packed", "--block", 16) == 0
    assert documents(tmp_path / "packed") == TEXTS


UNUSABLE: dict[str, list[Any]] = {
    "jsonl": [None, math.nan, math.inf, ["a"], {"b": 1}, ""],
    "json": [None, math.nan, -math.inf, [], {}, ""],
    "csv": ["", "NA", "nan", "NaN", "null", "None"],
    "tsv": ["", "N/A", "nan", "<NA>", "NULL", "None"],
    "parquet": [None, None, "", None, None, ""],
}


@pytest.mark.parametrize("kind", KINDS)
def test_rows_with_an_unusable_label_are_left_out(kind: str, tmp_path: Path) -> None:
    columns = {"text": [*TEXTS, "good one", "good two"], "y": [*UNUSABLE[kind], "-1", "none"]}
    source = write_rows(kind, tmp_path, columns)
    assert convert(source, tmp_path / "out", "--label-key", "y", "--max-bad", "80%") == 0
    assert [row["label"] for row in labelled(tmp_path / "out")] == ["-1", "none"]
    entry = about(tmp_path / "out")
    assert entry["left_out"] == {"label": 6} and entry["inputs"] == 8
    texts, findings = found_in(source)  # without labels the text is used
    assert texts == columns["text"] and not findings


def test_missing_numbers_of_parquet_are_no_labels(tmp_path: Path) -> None:
    source = put_parquet(tmp_path / "a.parquet", {"text": [*"abc"], "y": [1.5, math.nan, None]})
    texts, findings = found_in(source, label_key="y")
    assert texts == ["a"] and [kind for _, kind in findings] == ["label", "label"]


# ----------------------------------------------------------------------------------------- tables


CELL = st.text(st.sampled_from('a, "\n\té東'), max_size=8)


@settings(max_examples=200, deadline=None)
@given(
    rows=st.lists(st.tuples(CELL, st.sampled_from(["x", "y,z", 'q"']), CELL), max_size=8),
    end=st.sampled_from(["\n", "\r\n"]),
    mark=st.booleans(),
)
def test_csv_is_read_as_it_was_written(
    rows: list[tuple[str, str, str]],
    end: str,
    mark: bool,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    data = csv_bytes([["text", "label", "more"], *map(list, rows)], end)
    file = put(tmp_path_factory.mktemp("csv") / "a.csv", b"\xef\xbb\xbf" * mark + data)
    layout = open_text(file, label_key="label")
    found = [
        (item.content, item.columns["label"], item.columns["more"])
        for sample in layout.samples([])
        for item in layout.read(sample, [])
    ]
    assert found == rows


def test_damaged_tables_name_their_rows(tmp_path: Path) -> None:
    lines = [
        "text,label",
        "good,1",
        "too,many,3",
        "few",
        '"two\nlines",2',
        "caf\xe9,3",
        'open,"4',
        "x,5",
    ]
    file = put(tmp_path / "a.csv", "\n".join(lines).encode("latin-1"))
    texts, findings = found_in(file, label_key="label")
    assert texts[:2] == ["good", "two\nlines"]
    assert findings == [("a.csv, line 3", "row"), ("a.csv, line 4", "row"), ("a.csv", "row")]
    # The row that is not UTF-8 is refused by itself when it is encoded.
    assert convert(file, tmp_path / "out", "--label-key", "label", "--max-bad", "90%") == 0
    assert about(tmp_path / "out")["left_out"] == {"row": 3, "encoding": 1}
    assert [row["label"] for row in labelled(tmp_path / "out")] == ["1", "2"]


@pytest.mark.parametrize("kind", ["csv", "tsv"])
def test_names_of_columns(kind: str, tmp_path: Path) -> None:
    mark = "," if kind == "csv" else "\t"
    file = put(tmp_path / f"a.{kind}", f"a{mark}b\nc{mark}d\n".replace("\n", "\r\n"))
    options: dict[str, Any] = {"text_key": "text", "label_key": "y", "columns": ("text", "y")}
    assert found_in(file, **options) == (["a", "c"], [])
    assert found_in(file, label_key="y", text_key="a") == ([], [(f"a.{kind}", "row")])
    put(file, f"text{mark}y{mark}y\na{mark}b{mark}c\n")
    assert found_in(file, label_key="y") == ([], [(f"a.{kind}", "row")])
    put(file, f"text{mark}y\n")
    assert found_in(file, label_key="y") == ([], [(f"a.{kind}", "empty")])


def test_folders_of_tables_with_labels(tmp_path: Path) -> None:
    put(tmp_path / "in/a.csv", "text,y\none,1\n")
    put(tmp_path / "in/b.tsv.gz", gzip.compress(b"text\ty\ntwo\t2\n"))
    assert convert(tmp_path / "in", tmp_path / "out", "--label-key", "y") == 0
    assert {row["label"] for row in labelled(tmp_path / "out")} == {"1", "2"}


# ----------------------------------------------------------------------------------------- arrays


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=9,
)


@settings(max_examples=200, deadline=None)
@given(
    rows=st.lists(
        st.fixed_dictionaries({"text": st.text(max_size=20), "more": VALUES}), max_size=9
    ),
    indent=st.sampled_from([None, 0, 2]),
    ascii_only=st.booleans(),
    array=st.booleans(),
    chunk=st.integers(1, 40),
)
def test_json_is_read_in_pieces(
    rows: list[dict[str, Any]],
    indent: int | None,
    ascii_only: bool,
    array: bool,
    chunk: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    from shards import json_array

    dump = json.JSONEncoder(indent=indent, ensure_ascii=ascii_only).encode
    data = dump(rows) if array else "\n".join(map(dump, rows))
    file = put(tmp_path_factory.mktemp("json") / "a.json", data.encode("utf-8", "surrogatepass"))
    size, json_array.CHUNK = json_array.CHUNK, chunk
    try:
        with file.open("rb") as opened:
            assert list(json_array.values(opened, 10_000)) == rows
    finally:
        json_array.CHUNK = size
    if array or rows:
        texts, findings = read(open_text(file))
        assert texts == [row["text"] for row in rows]
        assert [one.kind for one in findings] == ["empty"] * (not any(texts))


@pytest.mark.parametrize(
    ("data", "texts", "kinds"),
    [
        ('[{"text": "a"}, {"text": "b"}', ["a", "b"], ["truncated"]),
        ('[{"text": "a"}, {"text": "b', ["a"], ["row"]),
        ('[{"text": "a"}, {broken}, {"text": "c"}]', ["a"], ["row"]),
        ('[{"text": "a"}, 5, ["x"], {"txt": "b"}, {"text": "c"}]', ["a", "c"], ["row"] * 3),
        ("[]", [], ["empty"]),
        ('{\n"text": "pretty"\n}\n', ["pretty"], []),
        ('{"text": "a"}\n{"text": "b"}\n', ["a", "b"], []),
        ('{"text": "a"}\n{broken}\n{"text": "b"}\n', ["a", "b"], ["row"]),
        ("[" * 100_000, [], ["row"]),
    ],
)
def test_damaged_and_other_json(
    data: str, texts: list[str], kinds: list[str], tmp_path: Path
) -> None:
    found, findings = found_in(put(tmp_path / "a.json", data))
    assert (found, [kind for _, kind in findings]) == (texts, kinds)


def test_a_large_array_is_read_in_little_memory(tmp_path: Path) -> None:
    import tracemalloc

    row = json.dumps({"text": "word " * 200}) + ",\n"
    file = put(tmp_path / "a.json", "[" + row * 20_000 + '{"text": "end"}]')
    layout = open_text(file)
    tracemalloc.start()
    number = sum(1 for sample in layout.samples([]) for _ in layout.read(sample, []))
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert number == 20_001 and most < 2_000_000 < file.stat().st_size / 10


@pytest.mark.parametrize("kind", KINDS)
def test_rows_without_text(kind: str, tmp_path: Path) -> None:
    """They are no documents, as blank lines, but a labelled row is missed."""
    source = write_rows(kind, tmp_path, {"text": ["one", "", "two"], "y": [*"abc"]})
    assert convert(source, tmp_path / "packed") == 0
    assert documents(tmp_path / "packed") == ["one", "two"]
    assert about(tmp_path / "packed")["quarantined"] == 0
    assert convert(source, tmp_path / "out", "--label-key", "y", "--max-bad", "50%") == 0
    assert [row["label"] for row in labelled(tmp_path / "out")] == ["a", "c"]
    assert about(tmp_path / "out")["left_out"] == {"empty": 1}
    empty = write_rows(kind, tmp_path / "empty", {"text": [""], "y": ["a"]})
    texts, [(name, reason)] = found_in(empty)
    assert texts == [""] and name.startswith(empty.name) and reason == "empty"
