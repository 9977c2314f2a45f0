"""One image of a corpus -> the members of its sample: KEY.jpg (or png, webp) and KEY.json.

    file, member of a tar, row of a table -> bytes -> decoded, to see damage -> the same bytes

KEY.json has "label" and its number among the sorted classes, "index", where the corpus tells them,
"width", "height", "path", and what else the corpus says. Lengths are in pixels.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from d2v_ds.data import images
from shards import parquet
from shards.family import Converted, Input, Sample
from shards.keys import part_key

FIELDS = ("jpg", "json", "png", "webp")
ASIDE = "aside"  # column of a plan: what the inputs after the image are, "cls", "json" or "txt"

Rejected = tuple[str, str]
Row = tuple[str, str, bytes, dict[str, Any]]  # key, name of the input, image, columns


@dataclass(frozen=True)
class ImageConverter:
    root: Path  # of the paths in the plan
    classes: tuple[str, ...] = ()  # sorted; (): not known
    resize: int | None = None  # the shorter side, where it is longer
    image_key: str = ""  # of tables
    label_key: str = ""

    modality: ClassVar[str] = "vision"
    length_unit: ClassVar[str] = "pixels"
    fields: ClassVar[tuple[str, ...]] = FIELDS
    sample_rate: ClassVar[int] = 0

    @property
    def about(self) -> dict[str, Any]:
        return {"classes": list(self.classes)} if self.classes else {}

    @property
    def files(self) -> dict[str, Path]:
        return {}

    @cached_property
    def _index(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.classes)}

    def convert(self, samples: Iterable[Sample]) -> Iterator[Converted]:
        for sample in samples:
            read = self._rows if self.image_key else self._file
            rejected: list[Rejected] = []
            found = 0
            for key, name, data, columns in read(sample, rejected):
                found += 1
                try:
                    yield self._sample(key, name, data, columns)
                except ValueError as error:
                    rejected.append((name, str(error)))
            if rejected or found > 1:
                yield Converted("", (), 0, tuple(rejected), found=max(0, found - 1))

    def _sample(self, key: str, name: str, data: bytes, columns: dict[str, Any]) -> Converted:
        """Raises ValueError when it is no image."""
        kind, w, h = images.inspect(data)
        if self.resize is not None and min(w, h) > self.resize:
            data, w, h = images.shrink(data, self.resize)
            kind = kind if kind in FIELDS else "png"
        elif kind not in FIELDS:
            data, kind = images.to_png(data), "png"
        about = {**columns, "path": name, "width": w, "height": h}
        label = columns.get("label")
        if label in self._index:
            about["index"] = self._index[label]
        meta = json.dumps(about).encode()
        members = {"json": meta, kind: data}
        return Converted(key, tuple(members.get(field) for field in FIELDS), w * h)

    def _file(self, sample: Sample, rejected: list[Rejected]) -> Iterator[Row]:
        """The image that a sample of the plan is, from a file or out of a tar."""
        image, *aside = sample.inputs
        columns = dict(sample.columns)
        try:
            kinds = columns.pop(ASIDE, "").split()
            for kind, item in zip(kinds, aside, strict=True):
                columns |= _said_aside(kind, self._bytes(item))
            yield sample.key, str(image), self._bytes(image), columns
        except OSError as error:
            rejected.append((str(image), error.strerror or str(error)))
        except ValueError as error:
            rejected.append((str(image), str(error)))

    def _bytes(self, item: Input) -> bytes:
        with (self.root / item.path).open("rb") as file:
            if item.bytes is None:
                return file.read()
            file.seek(item.bytes[0])
            return file.read(item.bytes[1])

    def _rows(self, sample: Sample, rejected: list[Rejected]) -> Iterator[Row]:
        """Those of a row group of Hugging Face's image kind: a struct of bytes and path, and a
        label that is a name or a class's number."""
        [part] = sample.inputs
        try:
            table = parquet.open_table(self.root / part.path)
            names = table.schema_arrow.names
            if self.image_key not in names:
                raise ValueError(f"has no column {self.image_key!r} (has: {', '.join(names)})")
            for number, row in parquet.rows(table, part, names):
                key = part_key(sample.key, number)
                name = f"{part.path}, row {number}"
                image = row.pop(self.image_key)
                data = image.get("bytes") if isinstance(image, dict) else image
                if not isinstance(data, bytes):
                    rejected.append((name, f"{self.image_key!r} has no bytes in it"))
                    continue
                columns = {k: v for k, v in row.items() if isinstance(v, str | int | float)}
                label = columns.pop(self.label_key, None)
                if label is not None:
                    known = isinstance(label, int) and 0 <= label < len(self.classes)
                    columns["label"] = self.classes[int(label)] if known else str(label)
                yield key, name, data, columns
        except (ValueError, OSError) as error:
            rejected.append((str(part), str(error)))


def _said_aside(kind: str, data: bytes) -> dict[str, Any]:
    """Columns from a WebDataset sample's other members. Raises ValueError."""
    try:
        text = data.decode()
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
        raise ValueError("its .json is no object")
    return columns
