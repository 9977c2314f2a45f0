"""Third-party WebDataset tars: KEY.jpg, .png or .webp with KEY.cls, KEY.json, KEY.txt
(https://github.com/webdataset/webdataset)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from d2v_ds.data.checks import Finding
from shards.family import Input, Item, Sample
from shards.findings import UNUSABLE, of_error
from shards.images.imagenet import is_imagenet
from shards.images.labels import NO_METADATA, labelled
from shards.images.layout import (
    EXTENSIONS,
    ImageLayout,
    pass_over_others,
)
from shards.images.tars import first_tar, not_empty, tars_of
from shards.keys import make_key
from shards.tars import grouped

ASIDE = "aside"  # column of a plan: (field, offset, size) of the members cls, json and txt


class WebDataset(ImageLayout):
    name = "webdataset"
    help = "third-party WebDataset tars with KEY.jpg, KEY.cls, KEY.json, KEY.txt; class = .cls"

    @classmethod
    def recognises(cls, source: Path) -> bool:
        tar = first_tar(source)
        return tar is not None and not is_imagenet(tar)

    def samples(self, findings: list[Finding]) -> Iterator[Sample]:
        yield from not_empty(self._samples(findings), self.source)

    def _samples(self, findings: list[Finding]) -> Iterator[Sample]:
        tars = tars_of(self.source)
        if self.source.is_dir():
            pass_over_others(self.source, tars, findings)
        for tar in tars:
            with tar.open("rb") as file:
                yield from _samples_of(file, tar.name, findings)

    @property
    def knows_inputs(self) -> bool:
        return True

    def read(self, sample: Sample, findings: list[Finding]) -> Iterator[Item[bytes]]:
        """The image, with the columns that the other members of the sample hold."""
        image = sample.inputs[0]
        columns: dict[str, Any] = {}
        reasons = []
        try:
            for kind, offset, size in sample.columns.get(ASIDE, ()):
                data = self.payload(Input(image.path, (offset, size)))
                try:
                    columns |= _columns(kind, data)
                except ValueError as error:
                    reasons.append(str(error))
            content = self.payload(image)
        except UNUSABLE as error:
            findings.append(of_error(str(image), error))
            return
        if "label" in columns:
            columns = labelled(columns)
        if reasons:
            columns[NO_METADATA] = ", ".join(reasons)
        yield Item(sample.key, str(image), content, columns)


def _samples_of(file: BinaryIO, name: str, findings: list[Finding]) -> Iterator[Sample]:
    fields = [extension[1:] for extension in EXTENSIONS]
    for key, image, group in grouped(file, name, fields, "image", findings, single=True):
        member = group[image]
        kinds = [kind for kind in ("json", "txt", "cls") if kind in group]
        # Columns, because only the image counts as an input of the corpus.
        aside = [(kind, group[kind].offset, group[kind].size) for kind in kinds]
        size = member.size + sum(size for _, _, size in aside)
        inputs = (Input(name, (member.offset, member.size)),)
        yield Sample(make_key(key), inputs, {ASIDE: aside} if aside else {}, size)


def _columns(kind: str, data: bytes) -> dict[str, Any]:
    """The columns that a .cls, .txt or .json member holds. Raises ValueError."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"its .{kind} is not UTF-8 ({error.reason})") from None
    if kind == "cls":
        return {"label": text.strip()}
    if kind == "txt":
        return {"text": text}
    try:
        columns = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its .json is damaged ({error})") from None
    if not isinstance(columns, dict):
        raise ValueError("its .json is not an object")
    return columns
