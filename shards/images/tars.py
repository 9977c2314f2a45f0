"""Common parts of the layouts of images in tars."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from d2v_ds.errors import UserError
from shards.family import Sample
from shards.images.layout import EXTENSIONS
from shards.tars import TAR
from shards.walking import extension_of


def tars_of(source: Path) -> list[Path]:
    """A tar, or the tars in a folder. Raises UserError if there are none."""
    tars = _in_folder(source) if source.is_dir() else [source]
    if not tars:
        raise UserError(f"{source}: contains no {TAR} file")
    return tars


def first_tar(source: Path) -> Path | None:
    """None if SOURCE is neither a tar nor a folder with tars."""
    if source.is_dir():
        return next(iter(_in_folder(source)), None)
    return source if extension_of(source.name) == TAR else None


def _in_folder(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if extension_of(file.name) == TAR)


def not_empty(samples: Iterable[Sample], source: Path) -> Iterator[Sample]:
    """The same samples. Raises UserError if there are none."""
    empty = True
    for sample in samples:
        empty = False
        yield sample
    if empty:
        raise UserError(
            f"{source}: its tars contain no sample with exactly one image ({', '.join(EXTENSIONS)})"
        )
