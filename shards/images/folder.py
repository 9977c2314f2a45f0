"""A folder tree of images. The first folder below SOURCE is the class, as in the ImageFolder of
torchvision (https://docs.pytorch.org/vision/stable/generated/torchvision.datasets.ImageFolder.html).

If all folders below SOURCE have the names of splits, as in SOURCE/train/CLASS, the class is the
folder below these, as in the ImageFolder of the datasets library.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from d2v_ds.data.checks import Finding
from d2v_ds.data.headers import image_type
from shards.family import Input, Sample
from shards.images.labels import NO_LABEL
from shards.images.layout import EXTENSIONS, USUAL, ImageLayout, ImageOptions
from shards.keys import make_key
from shards.links import unbroken
from shards.splits import stated_split
from shards.walking import FoundFile, extension_of, walk, wanted

READ = frozenset(EXTENSIONS)
BESIDE = frozenset(
    (".json", ".jsonl", ".txt", ".csv", ".tsv", ".xml", ".html", ".md", ".yaml", ".yml", ".npy",
     ".npz", ".py", ".tar", ".gz", ".zip", ".parquet")
)  # fmt: skip
"""Extensions of files that are not images. They are not opened, because there can be millions."""

COPIES = frozenset((".bak", ".old", ".orig", ".tmp", ".part", ".thm", ".jpg_original"))
"""Extensions of copies and thumbnails of images, which would be used twice."""


METADATA = ("metadata.csv", "metadata.jsonl")
"""Files with the labels of a folder for the datasets library."""


@dataclass(frozen=True)
class Folder(ImageLayout):
    name = "folder"
    help = "folder tree of images; class = the first folder below SOURCE"
    takes = "folder"

    split: bool = False
    """Whether the folders below SOURCE are splits, and the classes are below them."""

    @classmethod
    def recognises(cls, source: Path) -> bool:
        return source.is_dir()

    @classmethod
    def open(cls, source: Path, options: ImageOptions) -> Folder:
        layout = super().open(source, options)
        classes, empty = _with_images(source, _folders(source))
        remarks = _about_metadata(source) + _about_empty(empty)
        if not classes or not all(map(stated_split, classes)):
            remarks += _about_names(source, classes)
            return replace(layout, classes=tuple(classes), remarks=tuple(remarks))
        inner = [
            os.path.join(split, name) for split in classes for name in _folders(source / split)
        ]
        found, empty = _with_images(source, inner)
        remarks += _about_empty(empty) + _about_splits(classes, found)
        remarks += _about_nested(source, found, "below a split")
        names = tuple(sorted({os.path.basename(path) for path in found}))
        return replace(layout, classes=names, split=True, remarks=tuple(remarks))

    def samples(self, findings: list[Finding]) -> Iterator[Sample]:
        # The path in place of the name, because the content decides for unknown extensions.
        found = walk(self.root, findings)
        files = (FoundFile(path, path, size, place) for path, _, size, place in found)
        own = wanted(self.root, files, lambda path: is_image(self.root, path), USUAL, findings)
        for file in unbroken(self.root, own, findings):
            path = file.path
            stem, extension = os.path.splitext(path)
            key = make_key(stem if extension.lower() in READ else path)
            yield Sample(key, (Input(path),), self._columns(path), file.size, file.place)

    def _columns(self, path: str) -> dict[str, str]:
        columns = {}
        *above, _ = path.split(os.sep)
        if self.split and above:
            columns["split"] = stated_split(above.pop(0))
        if above:
            columns["label"] = above[0]
        elif self.classes:
            columns[NO_LABEL] = "is in no folder of a class"
        return columns


def is_image(root: Path, path: str) -> bool:
    """Whether a file is an image that can be read, by its extension, or by its content if the
    extension is of no known type of file."""
    extension = extension_of(path)
    if extension in READ:
        return True
    if extension in BESIDE or extension in COPIES:
        return False
    try:
        with (root / path).open("rb") as file:
            found = image_type(file.read(16))
    except OSError:
        return False
    # TIFF is also the container of raw photos and slides, of which Pillow reads only a thumbnail.
    return bool(found) and (found != "tif" or not extension)


def _folders(source: Path) -> list[str]:
    with os.scandir(source) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))


def _with_images(source: Path, names: list[str]) -> tuple[list[str], list[str]]:
    """(folders that hold an image, folders that hold none), by their paths below SOURCE."""
    found: tuple[list[str], list[str]] = ([], [])
    for name in names:
        found[0 if _holds_image(source / name) else 1].append(name)
    return found


def _holds_image(folder: Path) -> bool:
    # Most classes have an image in the folder itself; `walk` would list and sort all of them.
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if extension_of(entry.name) in READ and entry.name[0] != "." and entry.is_file():
                return True
    return any(is_image(folder, file.path) for file in walk(folder))


def _about_metadata(source: Path) -> list[str]:
    return [
        f"{name} is not read; to use its columns, give it as SOURCE"
        for name in METADATA
        if (source / name).is_file()
    ]


def _about_empty(empty: list[str]) -> list[str]:
    if not empty:
        return []
    names = ", ".join(empty)
    if len(empty) == 1:
        return [f"the folder {names} has no sample and is no class"]
    return [f"the folders {names} have no sample and are no classes"]


def _about_names(source: Path, classes: list[str]) -> list[str]:
    """A remark about classes that may be none."""
    named = [name for name in classes if stated_split(name)]
    others = [name for name in classes if not stated_split(name)]
    if named:
        several = len(named) > 1
        are = (
            "are classes although they have names"
            if several
            else "is a class although it has the name"
        )
        split = "of splits" if several else "of a split"
        return [
            f"{', '.join(named)} {are} {split}, because other folders with images have none "
            f"({_first(others)}); to use the folders in {named[0]} as classes, give "
            f"SOURCE/{named[0]} as SOURCE"
        ]
    if len(classes) == 1 and (below := _folders(source / classes[0])):
        return [
            f"all images below the folder {classes[0]} are one class; if the folders in it are the "
            f"classes ({_first(below)}), give SOURCE/{classes[0]} as SOURCE"
        ]
    return _about_nested(source, classes, "below SOURCE")


def _about_nested(source: Path, classes: list[str], where: str) -> list[str]:
    """A remark if classes, given by their paths, have folders with images, which may be classes."""
    for path in classes:
        if os.stat(source / path).st_nlink == 2:  # itself and its `.`: no folders, nothing to list
            continue
        for name in _folders(source / path):
            if _holds_image(source / path / name):
                return [
                    f"the class is the folder {where}, such as {path}; folders in it, such as "
                    f"{path}/{name}, are no classes of their own"
                ]
    return []


def _first(names: list[str]) -> str:
    return f"{', '.join(names[:3])}{', ...' if names[3:] else ''}"


def _about_splits(top: list[str], classes: list[str]) -> list[str]:
    are = "are splits, not classes" if len(top) > 1 else "is a split, not a class"
    what = "the class is the folder below" if classes else "there are no classes below"
    return [f"{', '.join(top)} {are}: {what}"]
