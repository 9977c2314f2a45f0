"""Every file of a folder of images ends as a sample or as a finding, by name."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from d2v_ds.data.checks import ALTERED, PASSED_OVER
from shards.verify import verify
from tests.helpers.corpora import contents, found, put, put_tar
from tests.helpers.pictures import encoded
from tests.shards.pictures import picture
from tests.shards.test_images_family import convert
from tests.shards.test_images_labels import parquet

EXIF = Image.Exif()
EXIF[0x0112] = 6
GREY = Image.fromarray(np.arange(400, dtype=np.uint16).reshape(20, 20) * 100)

FILES: dict[str, list[bytes]] = {
    "jpg": [picture("JPEG"), picture("JPEG")[:-40], b"", b"<html>", picture("PNG"), picture("GIF"),
            encoded(Image.new("RGB", (9, 5)), "JPEG", exif=EXIF)],
    "jfif": [picture("JPEG")],
    "png": [picture(), picture()[:-30], encoded(GREY), encoded(Image.new("RGBA", (4, 4)))],
    "tif": [picture("TIFF"), encoded(Image.new("F", (3, 3), -1.0), "TIFF"), picture("TIFF")[:90]],
    "gif": [picture("GIF"), picture("GIF")[:-200]],
    "webp": [picture("WEBP"), picture("WEBP")[:30]],
    "bmp": [picture("BMP"), picture("BMP")[:50]],
    "": [picture("JPEG"), b"text", picture("TIFF")],
    "unknown": [picture("PNG"), bytes(20), picture("TIFF")],
    "txt": [b"text", picture()],
    "mp4": [b"\0\0\0\x18ftypisom"],
}  # fmt: skip
NAMES = [(extension, i) for extension, files in FILES.items() for i in range(len(files))]
FOLDERS = ["", "cat", "dog", "cat/deep", "train", ".hidden", "x.y"]


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(chosen=st.lists(st.tuples(st.sampled_from(FOLDERS), st.sampled_from(NAMES)), max_size=14))
def test_samples_and_findings_are_the_files(
    chosen: list[tuple[str, tuple[str, int]]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("law")
    put(root / "in/ok.png", picture())
    for number, (folder, (extension, i)) in enumerate(chosen):
        name = f"{number}.{extension}" if extension else str(number)
        put(root / "in" / folder / name, FILES[extension][i])
    files = {
        str(path.relative_to(root / "in")) for path in (root / "in").rglob("*") if path.is_file()
    }
    assert convert(root / "in", root / "out", "--max-bad", "100%", "-j1") == 0
    samples = [sample["json"]["path"] for sample in contents(root / "out").values()]
    left = found(root / "out", "quarantine.jsonl")
    notes = found(root / "out", "notes.jsonl")
    passed = {name for name, (_, kind) in notes.items() if kind in PASSED_OVER}
    altered = {name for name, (_, kind) in notes.items() if kind in ALTERED}
    hidden = {name for name in files if name.startswith(".hidden")}
    assert passed & hidden == set() and (".hidden" in passed) == bool(hidden)
    assert Counter([*samples, *left, *(passed - {".hidden"}), *hidden]) == Counter(files)
    assert altered <= set(samples)
    about = json.loads((root / "out/index.json").read_bytes())
    assert about["inputs"] == len(samples) + len(left)
    assert [line for line in verify(root / "out", 1) if not line.startswith("note: ")] == []


def test_files_beside_parquet_and_tars(tmp_path: Path) -> None:
    parquet(tmp_path / "hub/data/train.parquet", [0], ["cat"])
    put_tar(tmp_path / "tars/a.tar", [("0.jpg", picture("JPEG"))])
    put_tar(tmp_path / "net/n1.tar", [("n1_0.JPEG", picture("JPEG"))])
    for name in ("hub", "tars", "net"):
        put(tmp_path / name / "README.md", "text")
        put(tmp_path / name / "more/a.json", "{}")
        put(tmp_path / name / ".gitattributes", "")
        assert convert(tmp_path / name, tmp_path / f"out_{name}", "-j1") == 0
        kinds = {n: kind for n, (_, kind) in found(tmp_path / f"out_{name}", "notes.jsonl").items()}
        assert kinds == {"README.md": "type", "more/a.json": "type", ".gitattributes": "hidden"}


def test_rows_without_an_image_are_inputs(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    images = [
        {"bytes": picture(), "path": "a.png"},
        {"bytes": None, "path": "b.png"},
        None,
        {"bytes": b"<html>", "path": "c.png"},
        {"bytes": picture(seed=1), "path": None},
    ]
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"image": images}), tmp_path / "in/a.parquet", row_group_size=4)
    assert convert(tmp_path / "in", tmp_path / "out", "--max-bad", "60%", "-j1") == 0
    about = json.loads((tmp_path / "out/index.json").read_bytes())
    assert (about["inputs"], about["quarantined"]) == (5, 3) and len(
        contents(tmp_path / "out")
    ) == 2
    reasons = {
        name: reason for name, (reason, _) in found(tmp_path / "out", "quarantine.jsonl").items()
    }
    assert reasons["a.parquet, row 1"] == "'image' contains no bytes but the path 'b.png'"
