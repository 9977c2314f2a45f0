"""d2v-shards images: classes and splits of folder trees and tars."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import pytest

from shards.cli import main
from tests.helpers.corpora import contents, found, put, put_tar
from tests.shards.pictures import picture
from tests.shards.test_images_family import convert
from tests.shards.test_images_labels import altered, index, labels


def test_folders_without_an_image_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("cat/0.png", "dog/0.png"):
        put(tmp_path / "in" / name, picture())
    put(tmp_path / "in/notes/readme.md", "text")
    (tmp_path / "in/empty").mkdir()
    assert convert(tmp_path / "in", tmp_path / "out", "-j1") == 0
    text = capsys.readouterr().out
    remark = "the folders empty, notes have no sample and are no classes"
    assert f"{tmp_path / 'in'}: {remark}\n" in text and "(1 .md)" in text
    assert index(tmp_path / "out")["classes"] == ["cat", "dog"]
    assert index(tmp_path / "out")["remarks"] == [remark]
    assert main(["stats", str(tmp_path / "out")]) == 0
    assert remark in capsys.readouterr().out


def test_a_class_whose_images_are_damaged_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(tmp_path / "in/cat/0.png", picture())
    put(tmp_path / "in/dog/0.png", picture()[:90])
    assert convert(tmp_path / "in", tmp_path / "out", "-j1", "--max-bad", "50%") == 0
    assert index(tmp_path / "out")["classes"] == ["cat", "dog"]
    capsys.readouterr()
    assert main(["stats", str(tmp_path / "out")]) == 0
    assert "classes without a sample: dog" in capsys.readouterr().out


def imagenet_tree(root: Path) -> None:
    """ROOT/train/CLASS and ROOT/val/CLASS."""
    for split, number in (("train", 3), ("val", 2)):
        for name in ("n01440764", "n01443537"):
            for i in range(number):
                put(root / split / name / f"{name}_{i}.JPEG", picture("JPEG", seed=i))


def test_a_tree_with_train_and_val(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    imagenet_tree(tmp_path / "in")
    for split, number in (("train", 3), ("val", 2)):
        assert convert(tmp_path / "in" / split, tmp_path / split, "-j1") == 0
        counts = Counter(labels(tmp_path / split).values())
        assert counts == {"n01440764": number, "n01443537": number}
        assert "split" not in capsys.readouterr().out.replace(str(tmp_path), "")
    assert convert(tmp_path / "in", tmp_path / "both", "-j1") == 0
    text = capsys.readouterr().out
    assert "train, val are splits, not classes: the class is the folder below" in text
    assert "several splits (6 train, 4 validation)" in text and "--only 'train/**'" in text
    assert Counter(labels(tmp_path / "both").values()) == {"n01440764": 5, "n01443537": 5}
    assert index(tmp_path / "both")["classes"] == ["n01440764", "n01443537"]
    splits = Counter(s["json"]["split"] for s in contents(tmp_path / "both").values())
    assert splits == {"train": 6, "validation": 4}


@pytest.mark.parametrize(
    ("folders", "split"),
    [
        (("Training_Set/cat", "test_set/cat"), ["train", "test"]),
        (("train2017", "val2017"), ["train", "validation"]),
        (("train/a/cat", "annotations"), ["train"]),
    ],
)
def test_names_of_splits(folders: tuple[str, ...], split: list[str], tmp_path: Path) -> None:
    for name in folders:
        is_image = name != "annotations"
        put(tmp_path / "in" / name / ("0.png" if is_image else "a.json"), picture())
    assert convert(tmp_path / "in", tmp_path / "out", "-j1") == 0
    metas = [sample["json"] for sample in contents(tmp_path / "out").values()]
    assert sorted(meta["split"] for meta in metas) == sorted(split)
    labels = {"Training_Set/cat": "cat", "train2017": None, "train/a/cat": "a"}
    assert {meta.get("label") for meta in metas} == {labels[folders[0]]}


@pytest.mark.parametrize(
    ("names", "remark"),
    [
        (["train/0", "val/0", "other/0"], "train, val are classes although they have names of"),
        (
            ["train/cat/0", "other/0"],
            "train is a class although it has the name of a split, because other folders with "
            "images have none (other); to use the folders in train as classes, give SOURCE/train",
        ),
        (
            ["cat/0", "dog/big/0"],
            "the class is the folder below SOURCE, such as dog; folders in it, such as dog/big,",
        ),
        (
            ["train_images/0"],
            "train_images is a split, not a class: there are no classes below",
        ),
        (["data/cat/0", "data/dog/0"], "classes (cat, dog), give SOURCE/data as SOURCE"),
    ],
)
def test_folders_that_may_be_no_classes(names: list[str], remark: str, tmp_path: Path) -> None:
    for name in names:
        put(tmp_path / f"in/{name}.png", picture())
    assert convert(tmp_path / "in", tmp_path / "out", "-j1") == 0
    assert remark in index(tmp_path / "out")["remarks"][0]


def test_folders_below_the_classes_of_splits(tmp_path: Path) -> None:
    for name in ("train/cat/a/0", "val/cat/0"):
        put(tmp_path / f"in/{name}.png", picture())
    assert convert(tmp_path / "in", tmp_path / "out", "-j1") == 0
    assert "below a split, such as train/cat; folders" in index(tmp_path / "out")["remarks"][1]


def test_tars_of_several_splits_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("pics-train-000000", "pics-train-000001", "pics-val-000000"):
        put_tar(tmp_path / f"in/{name}.tar", [(f"{name}-0.jpg", picture("JPEG"))])
    assert convert(tmp_path / "in", tmp_path / "out", "-j1") == 0
    assert "several splits (2 train, 1 validation)" in capsys.readouterr().out


def test_imagenets_training_and_validation_tars(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As downloaded, in one folder: neither tar is a class."""
    inner = put_tar(tmp_path / "n1.tar", [("n1_0.JPEG", picture("JPEG"))]).read_bytes()
    train = put_tar(tmp_path / "in/ILSVRC2012_img_train.tar", [("n1.tar", inner)])
    val = put_tar(
        tmp_path / "in/ILSVRC2012_img_val.tar",
        [(f"ILSVRC2012_val_{i:08}.JPEG", picture("JPEG", seed=i)) for i in range(3)],
    )
    assert convert(tmp_path / "in", tmp_path / "out", "-j1") == 2
    assert f"give {train} as SOURCE" in capsys.readouterr().err
    assert convert(train, tmp_path / "train", "-j1") == 0
    assert labels(tmp_path / "train") == {"n1/n1_0": "n1"}
    assert convert(val, tmp_path / "val", "-j1") == 0
    assert list(labels(tmp_path / "val").values()) == [None] * 3


def test_a_class_can_be_called_train(tmp_path: Path) -> None:
    for name in ("train/0.png", "bus/0.png"):
        put(tmp_path / "in" / name, picture())
    assert convert(tmp_path / "in", tmp_path / "out", "-j1") == 0
    assert labels(tmp_path / "out") == {"train/0": "train", "bus/0": "bus"}


def test_labels_of_webdataset_tars(tmp_path: Path) -> None:
    cls = {"a": b"3\n", "b": b"-1", "c": b"", "d": b"\xef\xbb\xbf cat \r\n"}
    members = []
    for key, data in cls.items():
        members += [(f"{key}.jpg", picture("JPEG")), (f"{key}.cls", data)]
    members += [("e.jpg", picture("JPEG")), ("e.json", b'{"label": null, "caption": "x"}')]
    members += [("f.jpg", picture("JPEG")), ("f.depth.npy", b"x"), ("f.seg.png", b"x")]
    put_tar(tmp_path / "in/a.tar", members)
    assert convert(tmp_path / "in", tmp_path / "out", "-j1") == 0
    expected = {"a": "3", "b": None, "c": None, "d": "cat", "e": None, "f": None}
    assert labels(tmp_path / "out") == expected
    about = json.loads((tmp_path / "out/index.json").read_bytes())
    assert about["inputs"] == len(expected)  # labels are no inputs
    assert contents(tmp_path / "out")["e"]["json"]["caption"] == "x"
    kinds = Counter(kind for _, kind in found(tmp_path / "out", "notes.jsonl").values())
    assert kinds == {"no metadata": 3, "unused": 2}


def test_webdataset_tars_whose_members_begin_with_the_name_of_their_tar(tmp_path: Path) -> None:
    """As in ImageNet, but the class is in the members cls."""
    for tar in ("a", "b"):
        members = [(f"._{tar}_0.jpg", b"x")]
        for i in range(2):
            members += [(f"{tar}_{i}.jpg", picture("JPEG", seed=i)), (f"{tar}_{i}.cls", b"%d" % i)]
        put_tar(tmp_path / f"in/{tar}.tar", members)
    assert convert(tmp_path / "in", tmp_path / "out", "-j1") == 0
    assert labels(tmp_path / "out") == {"a_0": "0", "a_1": "1", "b_0": "0", "b_1": "1"}


def test_hidden_members_of_imagenet_are_passed_over(tmp_path: Path) -> None:
    members = [("._n1_0.JPEG", b"x"), ("n1_0.JPEG", picture("JPEG"))]
    put_tar(tmp_path / "in/n1.tar", members)
    assert convert(tmp_path / "in", tmp_path / "out", "-j1") == 0
    assert labels(tmp_path / "out") == {"n1/n1_0": "n1"}
    kinds = [kind for _, kind in found(tmp_path / "out", "notes.jsonl").values()]
    assert kinds == ["hidden"]


def test_members_of_imagenet_that_are_no_images(tmp_path: Path) -> None:
    inner = put_tar(
        tmp_path / "n1.tar", [("n1_0.JPEG", picture("JPEG")), ("n1_readme.txt", b"x")]
    ).read_bytes()
    put_tar(tmp_path / "all.tar", [("n1.tar", inner), ("LICENSE.txt", b"x")])
    assert convert(tmp_path / "all.tar", tmp_path / "out", "-j1") == 0
    assert labels(tmp_path / "out") == {"n1/n1_0": "n1"}
    notes = found(tmp_path / "out", "notes.jsonl")
    assert {name: kind for name, (_, kind) in notes.items()} == {
        "all.tar, n1.tar, n1_readme.txt": "type",
        "all.tar, LICENSE.txt": "type",
    }


def test_images_beside_the_folders_of_classes_are_told(tmp_path: Path) -> None:
    for i, name in enumerate(("cat/a.png", "dog/b.png", "c.png")):
        put(tmp_path / "in" / name, picture(seed=i))
    assert convert(tmp_path / "in", tmp_path / "out", "-j1") == 0
    assert labels(tmp_path / "out") == {"cat/a": "cat", "dog/b": "dog", "c": None}
    assert altered(tmp_path / "out") == {"c.png": "is in no folder of a class"}


def test_a_picture_with_several_names_is_one_sample(tmp_path: Path) -> None:
    put(tmp_path / "in/cat/a.png", picture())
    (tmp_path / "in/dog").mkdir()
    (tmp_path / "in/cat/b.png").symlink_to("a.png")
    os.link(tmp_path / "in/cat/a.png", tmp_path / "in/dog/c.png")
    (tmp_path / "in/dog/d.png").symlink_to("../cat/b.png")
    (tmp_path / "in/dog/e.png").symlink_to(put(tmp_path / "elsewhere/e.png", picture(seed=1)))
    assert convert(tmp_path / "in", tmp_path / "out", "-j1") == 0
    assert labels(tmp_path / "out") == {"cat/a": "cat", "dog/e": "dog"}
    reason = ("is a link to cat/a.png", "linked twice")
    expected = dict.fromkeys(("cat/b.png", "dog/c.png", "dog/d.png"), reason)
    assert found(tmp_path / "out", "notes.jsonl") == expected


def test_a_link_to_nothing(tmp_path: Path) -> None:
    put(tmp_path / "in/a.png", picture())
    (tmp_path / "in/b.png").symlink_to("gone.png")
    assert convert(tmp_path / "in", tmp_path / "out", "-j1", "--max-bad", "50%") == 0
    assert found(tmp_path / "out", "quarantine.jsonl") == {
        "b.png": ("is a link to gone.png: No such file or directory", "link")
    }
