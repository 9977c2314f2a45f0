"""A folder tree of images. The first folder below SOURCE is the class, as in the ImageFolder of
torchvision (https://docs.pytorch.org/vision/stable/generated/torchvision.datasets.ImageFolder.html).

If all folders below SOURCE have the names of splits, as in SOURCE/train/CLASS, the class is the
folder below these, as in the ImageFolder of the datasets library.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from d2v_ds.data.checks import Finding
from d2v_ds.data.headers import image_type
from shards.family import Input, Sample
from shards.images.labels import NO_LABEL
from shards.images.layout import EXTENSIONS, USUAL, ImageLayout, ImageOptions
from shards.keys import make_key
from shards.splits import stated_split
from shards.walking import extension_of, walk, wanted

READ = frozenset(EXTENSIONS)
BESIDE = frozenset(
    (".json", ".jsonl", ".txt", ".csv", ".tsv", ".xml", ".html", ".md", ".yaml", ".yml", ".npy",
     ".npz", ".py", ".tar", ".gz", ".zip", ".parquet")
)  # fmt: skip
"""Extensions of files that are not images. They are not opened, because there can be millions."""

COPIES = frozenset((".bak", ".old", ".orig", ".tmp", ".part", ".thm", ".jpg_original"))
"""Extensions of copies and thumbnails of images, which would be used twice."""


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
        remarks = _about_empty(empty)
        if not classes or not all(map(stated_split, classes)):
            remarks += _about_names(source, classes)
            return replace(layout, classes=tuple(classes), remarks=tuple(remarks))
        inner = [
            os.path.join(split, name) for split in classes for name in _folders(source / split)
        ]
        found, empty = _with_images(source, inner)
        remarks += _about_empty(empty) + _about_splits(classes, found)
        names = tuple(sorted({os.path.basename(path) for path in found}))
        return replace(layout, classes=names, split=True, remarks=tuple(remarks))

    def samples(self, findings: list[Finding]) -> Iterator[Sample]:
        # The path in place of the name, because the content decides for unknown extensions.
        files = (file._replace(name=file.path) for file in walk(self.root, findings))
        own = wanted(self.root, files, lambda path: is_image(self.root, path), USUAL, findings)
        for path, _, size in own:
            stem, extension = os.path.splitext(path)
            key = make_key(stem if extension.lower() in READ else path)
            yield Sample(key, (Input(path),), self._columns(path), size)

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
        below = source / name
        holds = any(is_image(below, file.path) for file in walk(below))
        found[0 if holds else 1].append(name)
    return found


def _about_empty(empty: list[str]) -> list[str]:
    if not empty:
        return []
    names = ", ".join(empty)
    if len(empty) == 1:
        return [f"the folder {names} has no sample and is no class"]
    return [f"the folders {names} have no sample and are no classes"]


def _about_names(source: Path, classes: list[str]) -> list[str]:
    """A remark about classes that may be none."""
    if len({stated_split(name) for name in classes} - {""}) > 1:
        names = ", ".join(filter(stated_split, classes))
        return [f"{names} are classes although they have names of splits"]
    if len(classes) == 1 and (below := _folders(source / classes[0])):
        return [
            f"all images below the folder {classes[0]} are one class; if the folders in it are the "
            f"classes ({', '.join(below[:3])}{', ...' if below[3:] else ''}), give "
            f"SOURCE/{classes[0]} as SOURCE"
        ]
    return []


def _about_splits(top: list[str], classes: list[str]) -> list[str]:
    names = ", ".join(top) + (" are splits" if len(top) > 1 else " is a split")
    what = "the class is the folder below" if classes else "there are no classes below"
    return [f"{names}, not classes: {what}"]
