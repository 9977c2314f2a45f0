"""d2v-shards images: classes of every layout, images without a label, and splits."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards import parquet as parquet_files
from shards.images.labels import NO_LABEL, label_of, labelled
from tests.helpers.corpora import contents, found, put
from tests.shards.pictures import picture
from tests.shards.test_images_family import convert

NAN, INFINITE = float("nan"), float("inf")


def labels(folder: Path) -> dict[str, Any]:
    """{key: label; None: without one}."""
    return {key: sample["json"].get("label") for key, sample in contents(folder).items()}


def index(folder: Path) -> dict[str, Any]:
    about: dict[str, Any] = json.loads((folder / "index.json").read_bytes())
    return about


def altered(folder: Path) -> dict[str, str]:
    """{name of an image without a label: why}."""
    result = {}
    for name, (reason, kind) in found(folder, "notes.jsonl").items():
        assert kind == "no metadata" and reason.endswith(": kept without a label")
        result[name] = reason.removesuffix(": kept without a label")
    return result


# ------------------------------------------------------------------------------------------ values


@pytest.mark.parametrize(
    ("value", "label"),
    [
        ("cat", "cat"),
        ("cat ", "cat"),
        (" red door ", "red door"),
        (1, "1"),
        (1.0, "1"),
        (0, "0"),
        (1.5, "1.5"),
        (True, "true"),
        ("no", "no"),
        ("none", "none"),
        (None, ""),
        (NAN, ""),
        (INFINITE, ""),
        ("", ""),
        ("  ", ""),
        ("nan", ""),
        ("None", ""),
        ("null", ""),
        (-1, ""),
        (-1.0, ""),
        ("-1", ""),
        (["cat"], ""),
        ({"a": 1}, ""),
    ],
)
def test_one_rule_for_labels(value: Any, label: str) -> None:
    found, reason = label_of(value)
    assert found == label and bool(reason) != bool(found)


@pytest.mark.parametrize(
    ("value", "label"),
    [
        (0, "dog"),
        (1.0, "cat"),
        ("cat", "cat"),
        (-1, ""),
        (2, ""),
        ("bird", ""),
        (None, ""),
        (0.5, ""),
    ],
)
def test_numbers_of_named_classes(value: Any, label: str) -> None:
    assert label_of(value, ("dog", "cat"))[0] == label


@given(st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
))  # fmt: skip
def test_any_value_is_a_label_or_has_a_reason(value: Any) -> None:
    columns = labelled({"label": value, "caption": "x"})
    assert columns.pop("caption") == "x" and len(columns) == 1
    [(name, text)] = columns.items()
    assert name in ("label", NO_LABEL) and text.strip() == text != ""
    assert name == NO_LABEL or text.lower() not in ("nan", "none", "null", "-1") or text == "none"


# --------------------------------------------------------------------------------------- manifests


ROWS: list[Any] = [None, "cat", "dog", 1, 1.0, True, NAN, ["cat"], "", "cat "]
LABELS = [None, "cat", "dog", "1", "1", "true", None, None, None, "cat"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "lines.json", "a.ndjson"])
def test_labels_of_json(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"path": f"{i}.png", "label": label} for i, label in enumerate(ROWS)]
    rows.append({"path": "10.png"})
    for i in range(11):
        put(tmp_path / f"{i}.png", picture(seed=i))
    array = json.dumps(rows, indent=1 if name == "a.json" else None)
    put(tmp_path / name, array if name == "a.json" else "\n".join(map(json.dumps, rows)))
    assert convert(tmp_path / name, tmp_path / "out", "-j1") == 0
    assert "5 inputs were altered (5 no metadata)" in capsys.readouterr().out
    expected = {str(i): label for i, label in enumerate([*LABELS, None])}
    assert labels(tmp_path / "out") == expected
    assert index(tmp_path / "out")["classes"] == ["1", "cat", "dog", "true"]
    assert altered(tmp_path / "out") == {
        "0.png": "has no label",
        "6.png": "has no label",
        "7.png": "its label is neither text nor a number (['cat'])",
        "8.png": "has no label (it is empty)",
        "10.png": "has no label",
    }
    for sample in contents(tmp_path / "out").values():
        assert ("index" in sample["json"]) == ("label" in sample["json"])


QUOTES = ["a red door", '"open window', "a long road", '12" record', '"two birds', 'he said "no"']


def test_tsv_has_no_quotes(tmp_path: Path) -> None:
    rows = [f"{i}.png\tc{i % 2}\t{caption}" for i, caption in enumerate(QUOTES)]
    put(tmp_path / "m.tsv", "path\tlabel\tcaption\n" + "\n".join(rows))
    for i in range(len(QUOTES)):
        put(tmp_path / f"{i}.png", picture(seed=i))
    assert convert(tmp_path / "m.tsv", tmp_path / "out", "-j1") == 0
    for key, sample in contents(tmp_path / "out").items():
        meta = sample["json"]
        assert (meta["caption"], meta["label"]) == (QUOTES[int(key)], f"c{int(key) % 2}")
    assert index(tmp_path / "out")["inputs"] == len(QUOTES) == len(labels(tmp_path / "out"))


def test_csv_has_quotes(tmp_path: Path) -> None:
    put(
        tmp_path / "m.csv",
        'path,label,caption\n0.png,cat,"12"" record,\nred"\n1.png,,x\n2.png,nan,\n',
    )
    for i in range(3):
        put(tmp_path / f"{i}.png", picture(seed=i))
    assert convert(tmp_path / "m.csv", tmp_path / "out", "-j1") == 0
    assert contents(tmp_path / "out")["0"]["json"]["caption"] == '12" record,\nred'
    assert labels(tmp_path / "out") == {"0": "cat", "1": None, "2": None}
    assert len(altered(tmp_path / "out")) == 2


@pytest.mark.parametrize(
    "lines",
    [
        ['0.png,"open window', "1.png,a long road"],
        ['0.png,"open window', "1.png,a long road", '2.png,"two birds'],
        ['0.png,"open window', '1.png,x "y" z"', '2.png,"two" birds'],
    ],
)
def test_quotes_in_csv_that_would_join_rows(
    lines: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(tmp_path / "m.csv", "path,caption\n" + "\n".join(lines))
    assert convert(tmp_path / "m.csv", tmp_path / "out", "-j1") == 2
    assert f"{tmp_path / 'm.csv'}, line" in capsys.readouterr().err


def test_a_label_key_that_no_row_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(tmp_path / "0.png", picture())
    manifest = put(tmp_path / "m.csv", "path,classes\n0.png,cat\n")
    assert convert(manifest, tmp_path / "out", "--label-key", "clases", "-j1") == 2
    line = capsys.readouterr().err
    assert "--label-key" in line and "did you mean 'classes'?" in line
    assert convert(manifest, tmp_path / "out", "-j1") == 0  # the default need not exist
    assert labels(tmp_path / "out") == {"0": None} and altered(tmp_path / "out") == {}


def test_a_manifest_that_is_another_kind_of_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for text, message in (
        ("[1]", "element 1: is not a JSON object"),
        ("[", "is not JSON"),
        ("[{}]", "line 1: has no `path`"),
        ("[]", "lists no images"),
        ('{"images": []}', "has no `path`"),
    ):
        assert convert(put(tmp_path / "m.json", text), tmp_path / "out") == 2
        line = capsys.readouterr().err
        assert message in line and line.count("\n") == 1


def test_a_row_that_lists_an_image_again(tmp_path: Path) -> None:
    """The first row counts, also if the second one states another class."""
    for i in range(2):
        put(tmp_path / f"{i}.png", picture(seed=i))
    put(tmp_path / "m.csv", "path, label\n0.png,cat\n./0.png,dog\n1.png,dog\n")
    assert convert(tmp_path / "m.csv", tmp_path / "out", "-j1", "--max-bad", "50%") == 0
    assert labels(tmp_path / "out") == {"0": "cat", "1": "dog"}
    assert found(tmp_path / "out", "quarantine.jsonl") == {
        "./0.png": ("is listed again", "duplicate")
    }


def test_a_row_without_a_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(tmp_path / "m.csv", "path,label\n,cat\n")
    assert convert(tmp_path / "m.csv", tmp_path / "out") == 2
    assert "line 2: has no `path` but ''" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------- Parquet


def parquet(path: Path, values: list[Any], names: list[str] | None = None, **columns: Any) -> Path:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [{"bytes": picture(seed=i), "path": f"{i}.png"} for i in range(len(values))]
    table = pa.table({"image": images, "label": values, **columns})
    features: dict[str, Any] = {"image": {"_type": "Image"}}
    if names:
        features["label"] = {"names": names, "_type": "ClassLabel"}
        info = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": info})
    pq.write_table(table, path)
    return path


def by_row(folder: Path) -> dict[str, Any]:
    """{row: label}."""
    return {s["json"]["path"]: s["json"].get("label") for s in contents(folder).values()}


def test_every_parquet_file_has_class_names_of_its_own(tmp_path: Path) -> None:
    parquet(tmp_path / "in/a.parquet", [0, 1], ["cat", "dog"])
    parquet(tmp_path / "in/b.parquet", [0, 1, 2], ["dog", "cat", "bird"])
    parquet(tmp_path / "in/c.parquet", [0, 1])
    assert convert(tmp_path / "in", tmp_path / "out", "-j1") == 0
    assert by_row(tmp_path / "out") == {
        "a.parquet, row 0": "cat",
        "a.parquet, row 1": "dog",
        "b.parquet, row 0": "dog",
        "b.parquet, row 1": "cat",
        "b.parquet, row 2": "bird",
        "c.parquet, row 0": None,
        "c.parquet, row 1": None,
    }
    assert index(tmp_path / "out")["classes"] == ["cat", "dog", "bird"]
    for sample in contents(tmp_path / "out").values():
        if "label" in sample["json"]:
            names = ["cat", "dog", "bird"]
            assert sample["json"]["index"] == names.index(sample["json"]["label"])
    assert set(altered(tmp_path / "out").values()) == {
        "its file does not say which class its label 0 is",
        "its file does not say which class its label 1 is",
    }


def test_labels_that_are_no_class(tmp_path: Path) -> None:
    values = [0, -1, None, 2, 1]
    parquet(tmp_path / "in/a.parquet", values, ["cat", "dog"])
    assert convert(tmp_path / "in", tmp_path / "out", "-j1") == 0
    expected = ["cat", None, None, None, "dog"]
    assert by_row(tmp_path / "out") == {f"a.parquet, row {i}": x for i, x in enumerate(expected)}
    assert altered(tmp_path / "out") == {
        "a.parquet, row 1": "has no label (-1)",
        "a.parquet, row 2": "has no label",
        "a.parquet, row 3": "its label 2 is none of the 2 classes",
    }


def test_labels_without_class_names(tmp_path: Path) -> None:
    parquet(tmp_path / "in/a.parquet", [3, 0, -1])
    assert convert(tmp_path / "in", tmp_path / "out", "-j1") == 0
    assert by_row(tmp_path / "out") == {
        "a.parquet, row 0": "3",
        "a.parquet, row 1": "0",
        "a.parquet, row 2": None,
    }
    assert "classes" not in index(tmp_path / "out")


HUB = {
    "data/train-00000-of-00002.parquet": "train",
    "data/train-00001-of-00002.parquet": "train",
    "data/validation-00000-of-00001.parquet": "validation",
    "data/test-00000-of-00001.parquet": "test",
}


def test_splits_of_the_hub_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, split in HUB.items():
        parquet(tmp_path / "in" / name, [-1, -1] if split == "test" else [0, 1], ["cat", "dog"])
    parquet(tmp_path / "other/default/train/0000.parquet", [0], ["cat"])
    parquet(tmp_path / "other/default/test/0000.parquet", [0], ["cat"])
    assert convert(tmp_path / "in", tmp_path / "out", "-j1") == 0
    text = capsys.readouterr().out
    assert "several splits (2 test, 4 train, 2 validation), which are not kept apart" in text
    assert "--only '**/*train*'" in text and "2 inputs were altered (2 no metadata)" in text
    splits = Counter(sample["json"]["split"] for sample in contents(tmp_path / "out").values())
    assert splits == {"train": 4, "validation": 2, "test": 2}
    [remark] = index(tmp_path / "out")["remarks"]
    assert "several splits" in remark
    assert convert(tmp_path / "in/data/train-00000-of-00002.parquet", tmp_path / "one", "-j1") == 0
    assert "several splits" not in capsys.readouterr().out and "remarks" not in index(
        tmp_path / "one"
    )
    assert convert(tmp_path / "other", tmp_path / "out2", "-j1") == 0
    assert "several splits (1 test, 1 train)" in (text := capsys.readouterr().out)
    assert "--only 'default/train/**'" in text


def test_columns_of_parquet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = {"captions": [["a", "b"]], "box": [{"x": 1}], "mask": [b"\xff\xd8"], "none": [None]}
    parquet(tmp_path / "in/a.parquet", ["cat"], **more)
    assert convert(tmp_path / "in", tmp_path / "out", "-j1") == 0
    [sample] = contents(tmp_path / "out").values()
    assert sample["json"]["captions"] == ["a", "b"] and sample["json"]["box"] == {"x": 1}
    assert "mask" not in sample["json"] and "none" not in sample["json"]
    assert "the column mask is not kept" in capsys.readouterr().out


def test_a_large_row_group_is_not_read_at_once(tmp_path: Path) -> None:
    """A group of 50 MB in pages of 1 MB."""
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    noise = np.random.default_rng(0)
    table = pa.table({"image": [{"bytes": noise.bytes(100_000)} for _ in range(500)]})
    pq.write_table(table, tmp_path / "a.parquet", write_batch_size=10, compression=None)
    del table
    [(part, size)] = parquet_files.row_groups(tmp_path, "a.parquet")
    before, most, number = pa.total_allocated_bytes(), 0, 0
    for _ in parquet_files.rows(parquet_files.open_table(tmp_path / "a.parquet"), part, ["image"]):
        most = max(most, pa.total_allocated_bytes() - before)
        number += 1
    assert number == 500 and size > 50_000_000 and most < size / 3
