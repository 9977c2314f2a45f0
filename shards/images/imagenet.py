"""ImageNet: ILSVRC2012_img_train.tar, which contains one tar per class (https://image-net.org), a
folder with these tars, or one of them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from d2v_ds.data.checks import Finding
from d2v_ds.data.headers import SIDE_FIELDS
from d2v_ds.data.tar_scan import Member, about_unused
from d2v_ds.errors import UserError
from shards.family import Input, Sample
from shards.images.layout import EXTENSIONS, ImageLayout, ImageOptions, pass_over_others
from shards.images.tars import first_tar, not_empty, tars_of
from shards.keys import make_key
from shards.tars import TAR, sound_members
from shards.walking import NOT_READ, extension_of


def is_imagenet(tar: Path) -> bool:
    """Whether a tar contains tars, or images whose names begin with its own (n01440764.tar). Tars
    of WebDataset can have such names too (`a.tar` with `a_0.jpg` and `a_0.cls`), so a label or text
    beside the first image shows that a tar is one of these."""
    with tar.open("rb") as file:
        visible = (m for m in sound_members(file, tar.name, []) if not is_hidden(m))
        names = [os.path.basename(member.name) for member in islice(visible, 2)]
    if not names or names[0].endswith(TAR):
        return bool(names)
    extensions = {extension_of(name)[1:] for name in names}
    return names[0].startswith(f"{tar.stem}_") and extensions.isdisjoint(SIDE_FIELDS)


def is_hidden(member: Member) -> bool:
    """macOS stores `._a.jpg` next to `a.jpg`."""
    return os.path.basename(member.name).startswith(".")


@dataclass(frozen=True)
class ImageNet(ImageLayout):
    name = "imagenet"
    help = "ImageNet: a tar of tars or a folder of tars; class = name of the inner tar"

    nested: bool = False
    """Whether SOURCE is a tar of tars."""

    @classmethod
    def recognises(cls, source: Path) -> bool:
        tar = first_tar(source)
        return tar is not None and is_imagenet(tar)

    @classmethod
    def open(cls, source: Path, options: ImageOptions) -> ImageNet:
        layout = super().open(source, options)
        tars = tars_of(source)
        inner = _inner_tars(source, []) if source.is_file() else []
        if source.is_dir():
            _check_classes(source, tars)
        if inner:
            names = sorted(Path(member.name).stem for member in inner)
            return replace(layout, classes=tuple(names), nested=True)
        return replace(layout, classes=tuple(tar.stem for tar in tars))

    def samples(self, findings: list[Finding]) -> Iterator[Sample]:
        found = self._nested(findings) if self.nested else self._separate(findings)
        yield from not_empty(found, self.source)

    def _nested(self, findings: list[Finding]) -> Iterator[Sample]:
        inner = _inner_tars(self.source, findings)
        with self.source.open("rb") as file:
            for tar in inner:
                name = f"{self.source.name}, {tar.name}"
                end = tar.offset + tar.size
                members = sound_members(file, name, findings, tar.offset, end)
                yield from _class_samples(self.source.name, name, members, findings)

    def _separate(self, findings: list[Finding]) -> Iterator[Sample]:
        tars = tars_of(self.source)
        if self.source.is_dir():
            pass_over_others(self.source, tars, findings)
        for tar in tars:
            with tar.open("rb") as file:
                members = sound_members(file, tar.name, findings)
                yield from _class_samples(tar.name, tar.name, members, findings)


def _check_classes(source: Path, tars: list[Path]) -> None:
    """Raises UserError if a folder holds a tar of tars, such as that of the training images beside
    that of the validation images, because its tars are no classes then."""
    for tar in tars:
        with tar.open("rb") as file:
            first = next(sound_members(file, tar.name, []), None)
        if first is not None and first.name.endswith(TAR):
            raise UserError(
                f"{source}: {tar.name} contains tars of classes, so the tars of this folder are no "
                f"classes; give {tar} as SOURCE"
            )


def _inner_tars(source: Path, findings: list[Finding]) -> list[Member]:
    inner = []
    with source.open("rb") as file:
        for member in sound_members(file, source.name, findings):
            if member.name.endswith(TAR):
                inner.append(member)
            else:
                findings.append(Finding(f"{source.name}, {member.name}", NOT_READ, "type"))
    return inner


def _class_samples(
    path: str, name: str, members: Iterable[Member], findings: list[Finding]
) -> Iterator[Sample]:
    """name: of the tar of a class, in findings."""
    label = Path(name.rpartition(", ")[2]).stem
    for member in members:
        if is_hidden(member):
            findings.append(about_unused(member, f"{name}, "))
            continue
        stem, extension = os.path.splitext(member.name)
        if extension.lower() not in EXTENSIONS:
            findings.append(Finding(f"{name}, {member.name}", NOT_READ, "type"))
            continue
        inputs = (Input(path, (member.offset, member.size)),)
        yield Sample(make_key(f"{label}/{stem}"), inputs, {"label": label}, member.size)
