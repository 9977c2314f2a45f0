"""A folder tree of images. The first folder below SOURCE is the class, as in the ImageFolder of
torchvision (https://docs.pytorch.org/vision/stable/generated/torchvision.datasets.ImageFolder.html).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from d2v_ds.data.checks import Finding
from shards.family import Input, Sample
from shards.images.layout import EXTENSIONS, ImageLayout, ImageOptions
from shards.keys import make_key
from shards.walking import extension_of, walk, wanted


class Folder(ImageLayout):
    name = "folder"
    help = "folder tree of images; class = the first folder below SOURCE"
    takes = "folder"

    @classmethod
    def recognises(cls, source: Path) -> bool:
        return source.is_dir()

    @classmethod
    def open(cls, source: Path, options: ImageOptions) -> Folder:
        layout = super().open(source, options)
        with os.scandir(source) as entries:
            names = (e.name for e in entries if e.is_dir() and not e.name.startswith("."))
            return replace(layout, classes=tuple(sorted(names)))

    def samples(self, findings: list[Finding]) -> Iterator[Sample]:
        files = wanted(
            self.root,
            walk(self.root, findings),
            lambda name: extension_of(name) in EXTENSIONS,
            ", ".join(EXTENSIONS),
            findings,
        )
        for path, _, size in files:
            label, below, _ = path.partition(os.sep)
            columns = {"label": label} if below else {}
            yield Sample(make_key(os.path.splitext(path)[0]), (Input(path),), columns, size)
