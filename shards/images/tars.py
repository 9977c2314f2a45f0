"""Images in tars: ImageNet's tar of tars, and WebDataset's; each image an input by its place in a
file, so that nothing is unpacked."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from d2v_ds.data import tar_scan
from d2v_ds.errors import UserError
from shards.family import Input, Sample
from shards.images.converter import ASIDE
from shards.keys import make_key

EXTENSIONS = (
    *(".jpg", ".jpeg", ".png", ".webp"),
    *(".bmp", ".ppm", ".pgm", ".tif", ".tiff"),  # become png
)
Rejected = tuple[str, str]


@dataclass(frozen=True)
class Layout:
    root: Path  # of the paths of inputs
    samples: Iterable[Sample]
    classes: tuple[str, ...]  # sorted, or in the corpus' own order where it has one; (): unknown
    # (name, reason): of what no sample can be made; complete when the samples have been read
    rejected: list[Rejected] = field(default_factory=list)


def _tars(source: Path) -> list[Path]:
    tars = sorted(source.glob("*.tar")) if source.is_dir() else [source]
    if not tars:
        raise UserError(f"{source}: has no .tar in it")
    return tars


def imagenet(source: Path) -> Layout:
    tars = _tars(source)
    rejected: list[Rejected] = []
    if len(tars) == 1 and source.is_file():
        with source.open("rb") as file:
            inner = [m for m in scan(file, source.name, rejected) if m.name.endswith(".tar")]
        if inner:
            names = sorted(Path(member.name).stem for member in inner)
            samples = _nested(source, inner, rejected)
            return Layout(source.parent, samples, tuple(names), rejected)
        rejected.clear()
    samples = _one_a_class(tars, rejected)
    root = source if source.is_dir() else source.parent
    return Layout(root, samples, tuple(tar.stem for tar in tars), rejected)


def _nested(
    source: Path, inner: list[tar_scan.Member], rejected: list[Rejected]
) -> Iterator[Sample]:
    with source.open("rb") as file:
        for tar in inner:
            name = f"{source.name}, {tar.name}"
            members = scan(file, name, rejected, tar.offset, tar.offset + tar.size)
            yield from _class_samples(source.name, Path(tar.name).stem, members)


def _one_a_class(tars: list[Path], rejected: list[Rejected]) -> Iterator[Sample]:
    for tar in tars:
        with tar.open("rb") as file:
            yield from _class_samples(tar.name, tar.stem, scan(file, tar.name, rejected))


def _class_samples(path: str, label: str, members: Iterable[tar_scan.Member]) -> Iterator[Sample]:
    for member in members:
        stem, extension = os.path.splitext(member.name)
        if extension.lower() in EXTENSIONS:
            item = Input(path, (member.offset, member.size))
            yield Sample(make_key(f"{label}/{stem}"), (item,), {"label": label}, member.size)


def webdataset(source: Path) -> Layout:
    root = source if source.is_dir() else source.parent
    rejected: list[Rejected] = []
    return Layout(root, _grouped(_tars(source), rejected), (), rejected)


def _grouped(tars: list[Path], rejected: list[Rejected]) -> Iterator[Sample]:
    for tar in tars:
        with tar.open("rb") as file:
            for key, members in tar_scan.samples(scan(file, tar.name, rejected)):
                images = [kind for kind in members if f".{kind}" in EXTENSIONS]
                if len(images) != 1:
                    reason = f"has {len(images)} images, expected one ({', '.join(members)})"
                    rejected.append((f"{tar.name}, sample {key}", reason))
                    continue
                aside = [kind for kind in ("json", "txt", "cls") if kind in members]
                kinds = [images[0], *aside]
                inputs = tuple(
                    Input(tar.name, (members[kind].offset, members[kind].size)) for kind in kinds
                )
                columns = {ASIDE: " ".join(aside)} if aside else {}
                yield Sample(make_key(key), inputs, columns, sum(members[k].size for k in kinds))


def scan(
    file: BinaryIO, name: str, rejected: list[Rejected], start: int = 0, end: int | None = None
) -> Iterator[tar_scan.Member]:
    """Members of a tar, or of one within a tar, past damage: it is told, and the scan goes on at
    the next sound header."""
    at: int | None = start
    while at is not None and (end is None or at < end):
        try:
            yield from tar_scan.members(file, at, end)
            return
        except tar_scan.DamagedTar as error:
            rejected.append((name, f"{error}: what lies there is lost"))
            at = tar_scan.next_header(file, error.position)
