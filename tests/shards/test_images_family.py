"""d2v-shards images: every layout, unchanged bytes, damaged inputs, and reading by the loader."""

from __future__ import annotations

import gc
import io
import json
import sys
import tarfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset as wds
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from d2v_ds.data.checks import Unusable
from d2v_ds.data.shard_format import open_set
from d2v_ds.errors import UserError
from d2v_ds.loader.reading import read_samples
from d2v_ds.modalities.vision import Vision, VisionConfig
from shards.cli import main
from shards.family import Converted
from shards.findings import left_out
from shards.images import LAYOUTS
from shards.images.converter import ImageConverter
from shards.images.folder import Folder
from shards.images.layout import ImageLayout, ImageOptions
from shards.images.parquet import Parquet
from shards.layout import detect
from tests.helpers.corpora import found, quarantine
from tests.shards.pictures import picture

FIELDS = ("jpg", "json", "png", "webp")


def convert(*arguments: object) -> int:
    return main(["images", *map(str, arguments)])


def detected(source: Path) -> str:
    layout = detect(LAYOUTS, source)
    assert layout
    return layout.name


def convert_all(layout: ImageLayout) -> list[Converted]:
    """Converts every sample of a layout in this process."""
    return list(ImageConverter(layout).convert(list(layout.samples([]))))


def write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def write_tar(path: Path, members: dict[str, bytes]) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path.read_bytes()


def contents(folder: Path) -> dict[str, tuple[dict[str, Any], str, bytes]]:
    """{key: (json, kind of image, its bytes)} as the loader reads them."""
    result = {}
    for key, sample in read_samples(open_set(folder, "vision"), FIELDS):
        meta = json.loads(sample.pop("json"))
        [(kind, data)] = sample.items()
        result[key] = meta, kind, data
    return result


def kinds(folder: Path) -> dict[str, str]:
    """{input that was left out: kind}."""
    return {path: kind for path, (_, kind) in found(folder, "quarantine.jsonl").items()}


# ------------------------------------------------------------------------------------------ folder


def test_a_folder_tree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {
        "in/cat/1.jpg": picture("JPEG", seed=1),
        "in/cat/deep/2.JPEG": picture("JPEG", seed=2),
        "in/dog/1.png": picture("PNG", seed=3),
        "in/dog/x.webp": picture("WEBP", seed=4),
        "in/dog/grey.bmp": picture("BMP", seed=5),
        "in/alone.png": picture("PNG", seed=6),
        "in/dog/.hidden.png": b"not an image",
        "in/dog/notes.txt": b"not an image",
    }
    for name, data in files.items():
        write(tmp_path / name, data)
    assert convert(tmp_path / "in", tmp_path / "out", "-j1") == 0
    assert "layout folder" in capsys.readouterr().out
    read = contents(tmp_path / "out")
    assert set(read) == {"cat/1", "cat/deep/2", "dog/1", "dog/x", "dog/grey", "alone"}
    for key, kind in (("cat/1", "jpg"), ("cat/deep/2", "jpg"), ("dog/1", "png"), ("dog/x", "webp")):
        meta, made, data = read[key]
        assert made == kind and data == files[f"in/{meta['path']}"]
    assert read["cat/deep/2"][0] == {
        "label": "cat",
        "path": "cat/deep/2.JPEG",
        "width": 20,
        "height": 12,
        "index": 0,
    }
    assert read["dog/1"][0]["index"] == 1 and "label" not in read["alone"][0]
    meta, kind, data = read["dog/grey"]
    assert kind == "png"
    with Image.open(io.BytesIO(data)) as ours, Image.open(tmp_path / "in/dog/grey.bmp") as theirs:
        assert ours.tobytes() == theirs.tobytes()
    shards = open_set(tmp_path / "out")
    assert (shards.length_unit, shards.fields, shards.length) == ("pixels", FIELDS, 6 * 20 * 12)
    assert json.loads((tmp_path / "out/index.json").read_bytes())["classes"] == ["cat", "dog"]


def test_plain_webdataset_reads_it(tmp_path: Path) -> None:
    for i, kind in enumerate(("jpg", "png", "webp")):
        write(tmp_path / f"in/class/{i}.{kind}", picture(kind.replace("jpg", "jpeg"), seed=i))
    assert convert(tmp_path / "in", tmp_path / "out", "-j1") == 0
    shards = open_set(tmp_path / "out")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        urls = [str(shards.tar(shard)) for shard in shards.shards]
        theirs = {s["__key__"]: s for s in wds.WebDataset(urls, shardshuffle=False)}
        gc.collect()
    ours = contents(tmp_path / "out")
    assert theirs.keys() == ours.keys()
    for key, (meta, kind, data) in ours.items():
        assert theirs[key][kind] == data and json.loads(theirs[key]["json"]) == meta
        assert not {"jpg", "png", "webp"} - {kind} & theirs[key].keys()


def test_the_loader_decodes_it(tmp_path: Path) -> None:
    for i in range(4):
        write(tmp_path / f"in/{i}.{'png' if i % 2 else 'jpg'}", picture("PNG" if i % 2 else "JPEG"))
    assert convert(tmp_path / "in", tmp_path / "out", "-j1") == 0
    modality = Vision(VisionConfig(image_size=16, patch_size=4))
    for _, sample in read_samples(open_set(tmp_path / "out"), modality.extensions):
        assert modality.decode(sample, None).shape == (3, 16, 16)


def test_resize(tmp_path: Path) -> None:
    large, small = picture("JPEG", (200, 100)), picture("JPEG", (40, 30), seed=1)
    write(tmp_path / "in/large.jpg", large)
    write(tmp_path / "in/small.jpg", small)
    write(tmp_path / "in/tall.png", picture("PNG", (51, 333)))
    write(tmp_path / "in/wide.bmp", picture("BMP", (333, 51)))
    assert convert(tmp_path / "in", tmp_path / "out", "--resize", 50, "-j1") == 0
    read = contents(tmp_path / "out")
    assert read["small"][2] == small
    sizes = {"large": (100, 50), "tall": (50, 326), "wide": (326, 50), "small": (40, 30)}
    for key, size in sizes.items():
        meta, kind, data = read[key]
        with Image.open(io.BytesIO(data)) as image:
            assert image.size == (meta["width"], meta["height"]) == size
            assert kind == {"JPEG": "jpg", "PNG": "png"}[str(image.format)]
    with Image.open(io.BytesIO(large)) as image, Image.open(io.BytesIO(read["large"][2])) as ours:
        expected = image.resize((100, 50), Image.Resampling.BICUBIC)
        difference = np.asarray(expected, dtype=float) - np.asarray(ours, dtype=float)
    assert np.abs(difference).mean() < 4  # the error of JPEG on noise at quality 95


# ---------------------------------------------------------------------------------- other layouts


def test_imagenets_tar_of_tars(tmp_path: Path) -> None:
    """The structure of ILSVRC2012_img_train.tar (https://image-net.org/download-images)."""
    images = {
        f"{c}_{i}.JPEG": picture("JPEG", seed=10 * i + len(c))
        for c in ("n01440764", "n01443537")
        for i in (1, 27)
    }
    inner = {}
    for c in ("n01440764", "n01443537"):
        members = {name: data for name, data in images.items() if name.startswith(c)}
        inner[f"{c}.tar"] = write_tar(tmp_path / f"classes/{c}.tar", members)
    write_tar(tmp_path / "ILSVRC2012_img_train.tar", inner)
    for source in (tmp_path / "ILSVRC2012_img_train.tar", tmp_path / "classes"):
        assert detected(source) == "imagenet"
        out = tmp_path / f"out_{source.stem}"
        assert convert(source, out, "-j1") == 0
        read = contents(out)
        assert set(read) == {f"{name.split('_')[0]}/{name[:-5]}" for name in images}
        for key, (meta, kind, data) in read.items():
            name = key.split("/")[1]
            assert (kind, data) == ("jpg", images[f"{name}.JPEG"])
            assert meta["label"] == name.split("_")[0]
            assert meta["index"] == ["n01440764", "n01443537"].index(meta["label"])


def test_manifests(tmp_path: Path) -> None:
    for i in range(3):
        write(tmp_path / f"deep/{i}.png", picture(seed=i))
    rows = [(f"deep/{i}.png", "ab"[i % 2], 'says, "x"') for i in range(3)]
    csv = "path,kind,note\n" + "".join(f'{p},{k},"says, ""x"""\n' for p, k, _ in rows)
    write(tmp_path / "a.csv", csv.encode())
    write(tmp_path / "b.tsv", csv.replace('"says, ""x"""', "note").replace(",", "\t").encode())
    lines = [json.dumps({"path": p, "kind": k, "note": n}) for p, k, n in rows]
    write(tmp_path / "c.jsonl", "\n".join(lines).encode())
    for name in ("a.csv", "b.tsv", "c.jsonl"):
        out = tmp_path / f"out_{name}"
        assert convert(tmp_path / name, out, "--label-key", "kind", "-j1") == 0
        read = contents(out)
        assert len(read) == 3
        for key, (meta, _, data) in read.items():
            assert data == (tmp_path / f"{key}.png").read_bytes()
            i = int(key[-1])
            assert (meta["label"], meta["index"]) == ("ab"[i % 2], i % 2)
            assert meta["note"] == ("note" if name == "b.tsv" else 'says, "x"')


def test_parquet_of_hugging_face(tmp_path: Path) -> None:
    """Columns and schema of https://huggingface.co/docs/hub/datasets-image."""
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    data = [picture(seed=i) for i in range(5)]
    table = pa.table(
        {
            "img": [{"bytes": d, "path": f"{i}.png"} for i, d in enumerate(data)],
            "label": [0, 1, 1, 0, 1],
            "caption": [f"picture {i}" for i in range(5)],
        }
    )
    features = {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}
    schema = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(table.replace_schema_metadata(schema), tmp_path / "a.parquet", row_group_size=2)
    assert convert(tmp_path, tmp_path.parent / "pq", "--image-key", "img", "-j1") == 0
    read = contents(tmp_path.parent / "pq")
    assert sorted(meta["caption"] for meta, _, _ in read.values()) == [
        f"picture {i}" for i in range(5)
    ]
    for meta, kind, image in read.values():
        i = int(meta["caption"][-1])
        assert (kind, image) == ("png", data[i]) and meta["path"] == f"a.parquet, row {i}"
        index = [0, 1, 1, 0, 1][i]
        assert (meta["label"], meta["index"]) == (["cat", "dog"][index], index)
    about = json.loads((tmp_path.parent / "pq/index.json").read_bytes())
    assert about["classes"] == ["cat", "dog"] and about["inputs"] == 5


def test_webdataset_tars(tmp_path: Path) -> None:
    members: dict[str, bytes] = {}
    for i in range(4):
        members[f"x/{i}.jpg"] = picture("JPEG", seed=i)
        members[f"x/{i}.cls"] = str(i % 2).encode()
        if i:
            members[f"x/{i}.json"] = json.dumps({"width": 1, "source": "web"}).encode()
        members[f"x/{i}.txt"] = f"a picture {i}".encode()
    write_tar(tmp_path / "in/a-000000.tar", members)
    assert detected(tmp_path / "in") == "webdataset"
    assert convert(tmp_path / "in", tmp_path / "out", "-j1") == 0
    read = contents(tmp_path / "out")
    for i in range(4):
        meta, kind, data = read[f"x/{i}"]
        assert (kind, data) == ("jpg", members[f"x/{i}.jpg"])
        assert (meta["label"], meta["text"], meta["width"]) == (str(i % 2), f"a picture {i}", 20)
        assert meta.get("source") == ("web" if i else None)


# ---------------------------------------------------------------------------------- damaged inputs


def test_damaged_images_are_left_out_and_named(tmp_path: Path) -> None:
    good = picture("JPEG", (64, 64))
    write(tmp_path / "in/good.jpg", good)
    write(tmp_path / "in/cut.jpg", good[:-300])
    write(tmp_path / "in/empty.png", b"")
    write(tmp_path / "in/text.png", b"this is not an image")
    write(tmp_path / "in/wrong_name.png", good)
    assert convert(tmp_path / "in", tmp_path / "out", "--max-bad", "100%", "-j1") == 0
    read = contents(tmp_path / "out")
    assert {key: kind for key, (_, kind, _) in read.items()} == {
        "good": "jpg",
        "wrong_name": "jpg",
    }
    reasons = quarantine(tmp_path / "out")
    assert set(reasons) == {"cut.jpg", "empty.png", "text.png"}
    assert reasons["empty.png"] == "is empty"
    assert reasons["text.png"] == "cannot be read as an image (no known format)"
    assert reasons["cut.jpg"].startswith("lacks its end mark, so a part of the picture")
    assert kinds(tmp_path / "out") == {
        "cut.jpg": "truncated",
        "empty.png": "empty",
        "text.png": "format",
    }


def test_bad_metadata_of_an_image_is_named(tmp_path: Path) -> None:
    members = {
        "a.jpg": picture("JPEG"),
        "a.json": b"{broken",
        "b.jpg": picture("JPEG"),
        "b.json": b"[]",
        "c.jpg": picture("JPEG"),
        "c.txt": b"\xff",
        "d.jpg": picture("JPEG"),
    }
    write_tar(tmp_path / "a.tar", members)
    assert convert(tmp_path / "a.tar", tmp_path / "out", "-j1") == 0
    assert sorted(contents(tmp_path / "out")) == ["a", "b", "c", "d"]
    altered = found(tmp_path / "out", "notes.jsonl").values()
    assert {kind for _, kind in altered} == {"no metadata"}
    assert sorted(reason[:18] for reason, _ in altered) == [
        "its .json is damag",
        "its .json is not a",
        "its .txt is not UT",
    ]
    assert all(reason.endswith(": kept without metadata") for reason, _ in altered)


def test_the_conversion_continues_after_damage_in_a_tar(tmp_path: Path) -> None:
    """webdataset and tarfile would stop silently at the damage."""
    members = {f"n1_{i}.jpg": picture("JPEG", seed=i) for i in range(4)}
    whole = write_tar(tmp_path / "inner/n1.tar", members)
    places = [whole.index(f"n1_{i}.jpg".encode()) for i in range(4)]
    data = bytearray(whole)
    data[places[1] + 5] ^= 255
    nested = write_tar(tmp_path / "all.tar", {"n1.tar": bytes(data), "n2.tar": whole})
    assert bytes(data) in nested
    assert convert(tmp_path / "all.tar", tmp_path / "out", "--max-bad", "50%", "-j1") == 0
    expected = {f"n1/n1_{i}" for i in (0, 2, 3)} | {f"n2/n1_{i}" for i in range(4)}
    assert set(contents(tmp_path / "out")) == expected
    [(name, reason)] = quarantine(tmp_path / "out").items()
    assert name == "all.tar, n1.tar" and reason.startswith("damaged header")
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut/a.tar").write_bytes(whole[: places[3] + 700])
    assert convert(tmp_path / "cut", tmp_path / "out2", "--max-bad", "50%", "-j1") == 0
    assert set(contents(tmp_path / "out2")) == {f"n1_{i}" for i in range(3)}
    assert "extend past the end" in quarantine(tmp_path / "out2")["a.tar"]


def test_a_sample_without_one_image_is_named(tmp_path: Path) -> None:
    members = {"a.jpg": picture("JPEG"), "a.png": picture(), "b.txt": b"x", "c.png": picture()}
    write_tar(tmp_path / "a.tar", members)
    assert convert(tmp_path / "a.tar", tmp_path / "out", "--max-bad", "100%", "-j1") == 0
    assert quarantine(tmp_path / "out") == {
        "a.tar, a": "has 2 images, expected one (jpg, png)",
        "a.tar, b": "has no image, only txt",
    }


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.csv", b"file,label\nx,y\n", "including `path` or `file_name`, without dup"),
        ("a.csv", b"path,label\nx\n", "line 2: 1 columns, but the header has 2"),
        ("a.csv", b"", "found none"),
        ("a.csv", b"path,label\n", "lists no images"),
        ("a.tsv", b"path\tpath\n", "without duplicates"),
        ("a.csv", b"path;label\nx;y\n", "Its columns seem to be separated by `;`"),
        ("a.csv", b"path\tlabel\nx\ty\n", "Its columns seem to be separated by TAB"),
        ("a.tsv", b"path,label\nx,y\n", "Its columns seem to be separated by `,`"),
        ("a.csv", "path\nü\n".encode("latin-1"), "iconv -f LATIN1 -t UTF-8"),
        ("a.tsv", "path\nü’\n".encode("cp1252"), "line 2: is not UTF-8 at its byte 0; convert"),
        ("a.json", '[{"path": "ü’"}]'.encode("cp1252"), "iconv -f WINDOWS-1252 -t UTF-8"),
        ("a.csv", "path\nx\n".encode("utf-16"), "iconv -f UTF-16 -t UTF-8"),
        ("a.tsv", "path\nx\n".encode("utf-16"), "iconv -f UTF-16 -t UTF-8"),
        ("a.jsonl", b'{"path": "x"}\n'.decode().encode("utf-16-le"), "iconv -f UTF-16LE"),
        (
            "a.jsonl",
            b'{"path": "x"}\n{"pth": "x"}\n',
            "line 2: has no `path` or `file_name`; did you",
        ),
        ("a.jsonl", b"[]", "line 1: is not a JSON object"),
        ("a.jsonl", b"{", "line 1: is not JSON"),
        ("a.jsonl", b'{"path": 5}', "line 1: has no `path`"),
        ("a.zip", b"x", "its layout is not recognised; set --layout (imagenet, "),
        ("folder/readme.md", b"x", "contains no image (.jpg, .png, .webp, .gif,"),
        ("missing", None, "no such file or folder"),
    ],
)
def test_wrong_sources_are_refused(
    name: str,
    data: bytes | None,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if data is not None:
        write(tmp_path / name, data)
    assert convert(tmp_path / name.split("/")[0], tmp_path / "out") == 2
    line = capsys.readouterr().err
    assert message in line and line.count("\n") == 1


def test_tars_without_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tar(tmp_path / "a.tar", {"a.txt": b"x"})
    for layout in ("webdataset", "imagenet"):
        assert convert(tmp_path / "a.tar", tmp_path / "out", "--layout", layout) == 2
        assert "a.tar: its tars contain no sample with exactly one image" in capsys.readouterr().err


def test_a_listed_file_that_is_missing_is_named(tmp_path: Path) -> None:
    write(tmp_path / "1.png", picture())
    write(tmp_path / "a.csv", b"path\n1.png\n2.png\n")
    assert convert(tmp_path / "a.csv", tmp_path / "out", "--max-bad", "50%", "-j1") == 0
    assert quarantine(tmp_path / "out") == {"2.png": "No such file or directory"}


def test_parquet_of_another_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"picture": [b"x"], "image": [None]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"--image-key: .* has no column 'img'"):
        Parquet.open(tmp_path, ImageOptions(image_key="img"))
    made = convert_all(Parquet.open(tmp_path, ImageOptions()))
    assert [item for one in made for item in one.findings] == [
        ("a.parquet, row 0", "'image' contains no bytes", "row")
    ]
    (tmp_path / "a.parquet").write_bytes(b"PAR1 but nothing else PAR1")
    made = convert_all(Parquet.open(tmp_path, ImageOptions()))
    [(name, reason, _)] = [item for one in made for item in one.findings]
    assert name == "a.parquet" and reason.startswith("is not a Parquet file")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match="pip install pyarrow"):
        Parquet.open(tmp_path, ImageOptions())


@settings(max_examples=80, deadline=None)
@given(
    data=st.binary(max_size=300),
    cut=st.integers(0, 400),
    kind=st.sampled_from(["JPEG", "PNG", "WEBP", "BMP", "TIFF", "none"]),
)
def test_random_bytes_do_not_crash_the_conversion(
    data: bytes, cut: int, kind: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Every file is one sample or is reported."""
    if kind != "none":
        whole = picture(kind, (9, 9))
        data = whole[:cut] + data + whole[cut + len(data) :]
    root = tmp_path_factory.mktemp("fuzz")
    write(root / "a.png", data)
    made = convert_all(Folder.open(root, ImageOptions()))
    samples = [one for one in made if one.members]
    assert len(samples) + len(left_out(item for one in made for item in one.findings)) == 1
    for one in samples:
        members = {
            name: member
            for name, member in zip(FIELDS, one.members, strict=True)
            if member is not None
        }
        assert Vision.check_sample(members, {}) == one.length


def test_check(tmp_path: Path) -> None:
    assert Vision.check_sample({"png": picture(), "json": b"{}"}, {}) == 240
    modality = Vision(VisionConfig(image_size=16, patch_size=4))
    for members, number in (({"png": picture(), "jpg": picture("JPEG")}, 2), ({"cls": b"1"}, 0)):
        for read in (
            lambda m: Vision.check_sample(m, {}),
            lambda m: modality.decode(m, None),
        ):
            with pytest.raises(Unusable, match=f"has {number} images, expected one") as error:
                read(members)
            assert error.value.kind == "row"
    for text, message in ((b"[]", "json: is not an object"), (b"{", "json: is damaged")):
        with pytest.raises(Unusable, match=message):
            Vision.check_sample({"png": picture(), "json": text}, {})
    with pytest.raises(ValueError, match="ends within its pixels"):
        Vision.check_sample({"png": picture()[:100]}, {})
