"""One image of a corpus -> the members of its sample: KEY.jpg (or png, webp) and KEY.json.

    item (encoded image) -> decoded, which detects damage -> the same bytes

KEY.json has "width", "height", "path", the columns of the corpus, and, if the corpus defines
classes, "label" and "index", the number of the label among the classes. Lengths are in pixels.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from d2v_ds.data import images
from d2v_ds.data.checks import Finding
from shards.family import Converted, Item, Sample
from shards.findings import of_error
from shards.images.layout import ImageLayout

FIELDS = ("jpg", "json", "png", "webp")


@dataclass(frozen=True)
class ImageConverter:
    layout: ImageLayout
    resize: int | None = None  # largest length of the shorter side, in pixels

    modality: ClassVar[str] = "vision"
    length_unit: ClassVar[str] = "pixels"
    fields: ClassVar[tuple[str, ...]] = FIELDS
    sample_rate: ClassVar[int] = 0

    @property
    def about(self) -> dict[str, Any]:
        return {"classes": list(self.layout.classes)} if self.layout.classes else {}

    @property
    def files(self) -> dict[str, Path]:
        return {}

    @cached_property
    def _index(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.layout.classes)}

    def convert(self, samples: Iterable[Sample]) -> Iterator[Converted]:
        for sample in samples:
            findings: list[Finding] = []
            found = 0
            for item in self.layout.read(sample, findings):
                found += 1
                try:
                    yield self._sample(item)
                except ValueError as error:
                    findings.append(of_error(item.name, error))
            if findings or found > 1:
                yield Converted("", (), 0, tuple(findings), max(0, found - 1))

    def _sample(self, item: Item[bytes]) -> Converted:
        """Raises ValueError if the content is not an image."""
        data = item.content
        kind, w, h = images.inspect(data)
        if self.resize is not None and min(w, h) > self.resize:
            data, w, h = images.shrink(data, self.resize)
            kind = kind if kind in FIELDS else "png"
        elif kind not in FIELDS:
            data, kind = images.to_png(data), "png"
        about = {**item.columns, "path": item.name, "width": w, "height": h}
        label = item.columns.get("label")
        if label in self._index:
            about["index"] = self._index[label]
        meta = json.dumps(about).encode()
        members = {"json": meta, kind: data}
        return Converted(item.key, tuple(members.get(field) for field in FIELDS), w * h)
