"""The base class of all image layouts, and the options that they depend on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from d2v_ds.data.checks import Finding
from d2v_ds.errors import UserError, suggestion
from shards.layout import Layout
from shards.walking import NOT_READ, walk

LABEL_KEY = "label"

EXTENSIONS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp"),  # stored unchanged
    *(".gif", ".bmp", ".dib", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
    *(".jp2", ".j2k", ".jpx", ".jpf", ".avif", ".tga", ".qoi", ".pcx", ".sgi"),
)
USUAL = "image (.jpg, .png, .webp, .gif, .tif, .bmp, ...)"  # for messages


@dataclass(frozen=True)
class ImageOptions:
    """Options of d2v-shards images that layouts depend on."""

    image_key: str = "image"
    label_key: str = LABEL_KEY


@dataclass(frozen=True)
class ImageLayout(Layout[ImageOptions, bytes], abstract=True):
    """An item holds an encoded image; its column "label", if it has one, is the class."""

    uses: ClassVar[tuple[str, ...]] = ()
    """Names of the ImageOptions that determine what this layout reads."""

    classes: tuple[str, ...] = ()
    """Sorted, or in the order that the corpus defines; (): unknown."""

    remarks: tuple[str, ...] = ()
    """What a user must know about the corpus, one sentence each, for the console and index.json."""


def check_label_key(source: Path, options: ImageOptions, columns: Iterable[str]) -> None:
    """Raises UserError if a column is named by --label-key that the corpus does not have. Without
    the default column there are no labels."""
    key = options.label_key
    if key != LABEL_KEY and key not in columns:
        raise UserError(f"--label-key: {source} has no column {key!r}{suggestion(key, columns)}")


def pass_over_others(folder: Path, used: Iterable[Path], findings: list[Finding]) -> None:
    """Adds the files below a folder that are not used to `findings`."""
    paths = {str(file.relative_to(folder)) for file in used}
    for file in walk(folder, findings):
        if file.path not in paths:
            findings.append(Finding(file.path, NOT_READ, "type"))
