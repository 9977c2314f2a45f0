"""Labels and columns of recordings equal those that the datasets library gives for the same input
(https://huggingface.co/docs/datasets), which needs torchcodec to read tars with recordings. Skipped
if the library is not installed."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from shards.cli import main
from tests.helpers.corpora import contents, put, recording

datasets = pytest.importorskip("datasets", reason="needs `pip install datasets`")

pytestmark = pytest.mark.filterwarnings("ignore")  # of the library
KEPT = ("label", "text", "speaker")


@pytest.fixture
def load(tmp_path: Path) -> Any:
    datasets.disable_progress_bars()
    return partial(datasets.load_dataset, cache_dir=str(tmp_path / "cache"), split="train")


def ours(source: Path, out: Path) -> list[dict[str, Any]]:
    """Columns of the samples, in the order of their text."""
    assert main(["speech", str(source), str(out), "-j1", "--max-bad", "0%"]) == 0
    metas = [members["json"] for members in contents(out).values()]
    rows = [{name: meta[name] for name in KEPT if name in meta} for meta in metas]
    return sorted(rows, key=lambda row: str(row["text"]))


def test_parquet_with_classes(load: Any, tmp_path: Path) -> None:
    features = datasets.Features(
        {
            "audio": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")},
            "label": datasets.ClassLabel(names=["yes", "no"]),
            "text": datasets.Value("string"),
            "speaker": datasets.Value("int64"),
        }
    )
    cells = [{"bytes": recording(seconds=0.1, seed=i), "path": f"{i}.wav"} for i in range(5)]
    columns = {
        "audio": cells,
        "label": [1, 0, -1, 1, None],
        "text": [f"t{i}" for i in range(5)],
        "speaker": range(5),
    }
    (tmp_path / "in").mkdir()
    made = datasets.Dataset.from_dict(columns, features=features)
    made.to_parquet(str(tmp_path / "in" / "train.parquet"))
    theirs = load("parquet", data_files=str(tmp_path / "in" / "*.parquet"))
    names = theirs.features["label"].names
    expected = [
        {"text": row["text"], "speaker": row["speaker"]}
        | ({"label": names[row["label"]]} if row["label"] in (0, 1) else {})
        for row in theirs.remove_columns("audio")
    ]
    assert ours(tmp_path / "in", tmp_path / "out") == expected


@pytest.mark.parametrize("kind", ["jsonl", "json", "tsv"])
def test_manifests(kind: str, load: Any, tmp_path: Path) -> None:
    texts = ['said "no', "12 inches\u2028and more", "ümlaut", "plain"]
    rows = [
        {"path": f"{i}.wav", "text": text, "speaker": f"s{i}", "label": f"l{i % 2}"}
        for i, text in enumerate(texts)
    ]
    for i in range(len(rows)):
        put(tmp_path / f"{i}.wav", recording(seconds=0.1, seed=i))
    if kind == "tsv":
        lines = ["\t".join(rows[0]), *("\t".join(row.values()) for row in rows)]
        source = put(tmp_path / "rows.tsv", "".join(f"{line}\n" for line in lines))
        theirs = load("csv", data_files=str(source), sep="\t", quoting=3)  # csv.QUOTE_NONE
    else:
        text = json.dumps(rows) if kind == "json" else "".join(json.dumps(r) + "\n" for r in rows)
        source = put(tmp_path / f"rows.{kind}", text)
        theirs = load("json", data_files=str(source))
    expected = [{name: row[name] for name in KEPT} for row in theirs]
    assert ours(source, tmp_path / "out") == sorted(expected, key=lambda row: str(row["text"]))
