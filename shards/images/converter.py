"""One image of a corpus -> the members of its sample: KEY.jpg (or png, webp) and KEY.json.

    item (encoded image) -> decoded, which detects damage -> the same bytes, or a PNG

KEY.json has "width" and "height" of the upright image, "path", the columns of the corpus, and, if
the corpus defines classes, "label" and "index", the number of the label among the classes. Lengths
are in pixels.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from d2v_ds.data import image_files
from d2v_ds.data.checks import Finding, Note
from shards.family import Converted, Item, Sample
from shards.findings import UNUSABLE, left_out, of_error
from shards.images.labels import NO_LABEL, NO_METADATA
from shards.images.layout import ImageLayout

FIELDS = ("jpg", "json", "png", "webp")


@dataclass(frozen=True)
class ImageConverter:
    layout: ImageLayout
    resize: int | None = None  # largest length of the shorter side, in pixels
    encode: str = ""  # jpg or png: the format of every image

    modality: ClassVar[str] = "vision"
    length_unit: ClassVar[str] = "pixels"
    fields: ClassVar[tuple[str, ...]] = FIELDS
    sample_rate: ClassVar[int] = 0

    @property
    def about(self) -> dict[str, Any]:
        about: dict[str, Any] = {}
        if self.layout.classes:
            about["classes"] = list(self.layout.classes)
        if self.layout.remarks:
            about["remarks"] = list(self.layout.remarks)
        return about

    @property
    def files(self) -> dict[str, Path]:
        return {}

    @property
    def knows_inputs(self) -> bool:
        return self.layout.knows_inputs

    @cached_property
    def _index(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.layout.classes)}

    def convert(self, samples: Iterable[Sample]) -> Iterator[Converted]:
        for sample in samples:
            findings: list[Finding] = []
            used = 0
            for item in self.layout.read(sample, findings):
                try:
                    yield self._sample(item)
                    used += 1
                except UNUSABLE as error:
                    findings.append(of_error(item.name, error))
            # The plan counts a row group as one input.
            found = used + len(left_out(findings)) - 1
            if findings or found:
                yield Converted("", (), 0, tuple(findings), found)

    def _sample(self, item: Item[bytes]) -> Converted:
        """Raises Unusable if the content is not an image."""
        image = image_files.stored(item.content, self.resize, self.encode)
        w, h = image.width, image.height
        columns = dict(item.columns)
        notes = [*image.notes]
        for column, without in ((NO_LABEL, "a label"), (NO_METADATA, "metadata")):
            if reason := columns.pop(column, ""):
                notes.append(Note("no metadata", f"{reason}: kept without {without}"))
        about = {**columns, "path": item.name, "width": w, "height": h}
        label = columns.get("label")
        if label in self._index:
            about["index"] = self._index[label]
        members = {"json": json.dumps(about).encode(), image.kind: image.data}
        findings = tuple(Finding(item.name, note.reason, note.kind) for note in notes)
        row = tuple(members.get(field) for field in FIELDS)
        return Converted(item.key, row, w * h, findings)
