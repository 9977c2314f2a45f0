"""Labels and sizes equal those that the datasets library gives for the same input, and it reads our
sets (https://huggingface.co/docs/datasets). Skipped if the library is not installed."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from d2v_ds.data.image_files import ORIENTATION
from d2v_ds.data.shard_format import open_set
from tests.helpers.corpora import contents, put
from tests.helpers.pictures import encoded, gradient
from tests.shards.pictures import picture
from tests.shards.test_images_family import convert
from tests.shards.test_images_labels import parquet

datasets = pytest.importorskip("datasets", reason="needs `pip install datasets`")

pytestmark = pytest.mark.filterwarnings("ignore")  # of the library


@pytest.fixture
def load(tmp_path: Path) -> Any:
    datasets.disable_progress_bars()
    return partial(datasets.load_dataset, cache_dir=str(tmp_path / "cache"))


def named(rows: Any) -> list[str | None]:
    """The class of each row; None: without one."""
    names = rows.features["label"].names
    return [names[i] if i is not None and i >= 0 else None for i in rows["label"]]


def ours(folder: Path) -> dict[str, dict[str, Any]]:
    """{path: metadata}."""
    return {s["json"]["path"]: s["json"] for s in contents(folder).values()}


def classes(folder: Path) -> list[str]:
    result: list[str] = json.loads((folder / "index.json").read_bytes())["classes"]
    return result


def test_a_folder_tree(load: Any, tmp_path: Path) -> None:
    kinds = {"0.jpg": "JPEG", "1.PNG": "PNG", "2.gif": "GIF", "3.jfif": "JPEG", "4.webp": "WEBP",
             "5.tif": "TIFF", "6.bmp": "BMP"}  # fmt: skip
    for label in ("dog", "cat", "10", "9"):
        for name, kind in kinds.items():
            put(tmp_path / "in" / label / name, picture(kind))
    (tmp_path / "in/empty").mkdir()
    put(tmp_path / "in/notes/readme.md", "x")
    rows = load("imagefolder", data_dir=str(tmp_path / "in"))["train"]
    assert convert(tmp_path / "in", tmp_path / "out", "-j1") == 0
    assert classes(tmp_path / "out") == rows.features["label"].names
    files = rows.cast_column("image", datasets.Image(decode=False))["image"]
    paths = [str(Path(file["path"]).relative_to(tmp_path / "in")) for file in files]
    theirs = dict(zip(paths, named(rows), strict=True))
    assert {path: meta["label"] for path, meta in ours(tmp_path / "out").items()} == theirs
    numbers = dict(zip(theirs, rows["label"], strict=True))
    assert {path: meta["index"] for path, meta in ours(tmp_path / "out").items()} == numbers


def test_a_tree_with_splits(load: Any, tmp_path: Path) -> None:
    for split in ("train", "test"):
        for label in ("cat", "dog"):
            for i in range(2):
                put(tmp_path / "in" / split / label / f"{i}.jpg", picture("JPEG", seed=i))
    sets = load("imagefolder", data_dir=str(tmp_path / "in"))
    assert convert(tmp_path / "in", tmp_path / "out", "-j1") == 0
    metas = list(ours(tmp_path / "out").values())
    for split in ("train", "test"):
        mine = sorted(meta["label"] for meta in metas if meta["split"] == split)
        assert mine == sorted(str(name) for name in named(sets[split]))
    assert classes(tmp_path / "out") == sets["train"].features["label"].names


@pytest.mark.parametrize("turn", range(1, 9))
def test_sizes_of_turned_images(turn: int, load: Any, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = turn
    put(tmp_path / "in/a/0.jpg", encoded(gradient(30, 20), "JPEG", exif=exif))
    put(tmp_path / "in/b/0.png", encoded(gradient(30, 20), "PNG", exif=exif))
    rows = load("imagefolder", data_dir=str(tmp_path / "in"))["train"]
    assert convert(tmp_path / "in", tmp_path / "out", "-j1") == 0
    sizes = [(meta["width"], meta["height"]) for _, meta in sorted(ours(tmp_path / "out").items())]
    assert [image.size for image in rows["image"]] == sizes


def test_parquet(load: Any, tmp_path: Path) -> None:
    file = parquet(tmp_path / "in/a.parquet", [1, 0, -1, None, 2], ["cat", "dog", "bird"])
    rows = load("parquet", data_files=str(file))["train"]
    assert convert(file, tmp_path / "out", "-j1") == 0
    assert classes(tmp_path / "out") == rows.features["label"].names
    metas = ours(tmp_path / "out")
    assert [metas[f"a.parquet, row {i}"].get("label") for i in range(5)] == named(rows)


@pytest.mark.parametrize("encode", ["keep", "jpg", "png"])
def test_it_reads_our_sets(encode: str, load: Any, tmp_path: Path) -> None:
    """Also sets of several formats if these are encoded as one."""
    for i in range(8):
        kind = "PNG" if i % 2 and encode != "keep" else "JPEG"
        put(tmp_path / f"in/{'cat' if i < 4 else 'dog'}/{i}.{kind.lower()}", picture(kind, seed=i))
    assert convert(tmp_path / "in", tmp_path / "out", "--encode", encode, "-j1") == 0
    shards = open_set(tmp_path / "out")
    tars = [str(shards.tar(shard)) for shard in shards.shards]
    rows = load("webdataset", data_files=tars)["train"]
    mine = contents(tmp_path / "out")
    assert {row["__key__"]: row["json"]["label"] for row in rows} == {
        key: sample["json"]["label"] for key, sample in mine.items()
    }
    field = "png" if encode == "png" else "jpg"
    assert {row[field].size for row in rows} == {(20, 12)} and len(rows) == 8


def test_a_set_of_several_formats(load: Any, tmp_path: Path) -> None:
    """The library infers the fields from the first samples, which must have the same ones. It reads
    such a set if the fields are given."""
    for i in range(8):
        kind = "PNG" if i % 2 else "JPEG"
        put(tmp_path / f"in/{'cat' if i < 4 else 'dog'}/{i}.{kind.lower()}", picture(kind, seed=i))
    assert convert(tmp_path / "in", tmp_path / "out", "-j1") == 0
    tar = str(next(tmp_path.glob("out/*.tar")))
    with pytest.raises(ValueError, match="don't share the same prefix or the same types"):
        load("webdataset", data_files=[tar])
    value = datasets.Value
    meta = {"label": value("string"), "path": value("string"), "width": value("int64"),
            "height": value("int64"), "index": value("int64")}  # fmt: skip
    features = datasets.Features(
        {"__key__": value("string"), "__url__": value("string"), "json": meta,
         "jpg": datasets.Image(), "png": datasets.Image()}
    )  # fmt: skip
    rows = load("webdataset", data_files=[tar], features=features)["train"]
    assert (
        sorted((row["jpg"] is None) + 2 * (row["png"] is None) for row in rows) == [1] * 4 + [2] * 4
    )
