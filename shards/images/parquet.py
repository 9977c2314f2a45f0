"""Parquet with an image column as Hugging Face stores it: a struct of bytes and path, and a label
that is a name or the number of a class (https://huggingface.co/docs/hub/datasets-image).

A sample of the plan is a row group.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from d2v_ds.data.checks import Finding
from d2v_ds.errors import UserError, suggestion
from shards import parquet
from shards.family import Item, Sample
from shards.findings import of_error
from shards.images.layout import ImageLayout, ImageOptions
from shards.keys import make_key, part_key
from shards.walking import extension_of


class Parquet(ImageLayout):
    name = "parquet"
    help = "Parquet as Hugging Face stores images; class = the column of --label-key"
    uses = ("label_key", "image_key")

    @classmethod
    def recognises(cls, source: Path) -> bool:
        if source.is_dir():
            return next(source.rglob(f"*{parquet.EXTENSION}"), None) is not None
        return extension_of(source.name) == parquet.EXTENSION

    @classmethod
    def open(cls, source: Path, options: ImageOptions) -> Parquet:
        """Reads the schema of the first readable file."""
        layout = super().open(source, options)
        key = options.image_key
        for file in layout._files():
            try:
                table = parquet.open_table(file)
            except UserError:
                raise
            except ValueError:  # the conversion reports the reason
                continue
            names = table.schema_arrow.names
            if key not in names:
                raise UserError(
                    f"--image-key: {file} has no column {key!r}{suggestion(key, names)}"
                )
            return replace(layout, classes=_class_names(table, options.label_key))
        return layout

    def _files(self) -> list[Path]:
        if not self.source.is_dir():
            return [self.source]
        files = sorted(self.source.rglob(f"*{parquet.EXTENSION}"))
        if not files:
            raise UserError(f"{self.source}: contains no {parquet.EXTENSION} file")
        return files

    def samples(self, findings: list[Finding]) -> Iterator[Sample]:
        for file in self._files():
            groups = parquet.row_groups(self.root, str(file.relative_to(self.root)))
            for i, (part, size) in enumerate(groups):
                yield Sample(make_key(f"{os.path.splitext(part.path)[0]}-{i}"), (part,), {}, size)

    def read(self, sample: Sample, findings: list[Finding]) -> Iterator[Item[bytes]]:
        """The rows of a row group."""
        [part] = sample.inputs
        key = self.options.image_key
        try:
            table = parquet.open_table(self.root / part.path)
            names = table.schema_arrow.names
            if key not in names:
                raise ValueError(f"has no column {key!r} (columns: {', '.join(names)})")
            for number, row in parquet.rows(table, part, names):
                name = f"{part.path}, row {number}"
                image = row.pop(key)
                data = image.get("bytes") if isinstance(image, dict) else image
                if isinstance(data, bytes):
                    yield Item(part_key(sample.key, number), name, data, self._columns(row))
                else:
                    findings.append(Finding(name, f"{key!r} contains no bytes", "row"))
        except (ValueError, OSError) as error:
            findings.append(of_error(str(part), error))

    def _columns(self, row: dict[str, Any]) -> dict[str, Any]:
        columns = {k: v for k, v in row.items() if isinstance(v, str | int | float)}
        label = columns.pop(self.options.label_key, None)
        if label is not None:
            is_number = isinstance(label, int) and 0 <= label < len(self.classes)
            columns["label"] = self.classes[int(label)] if is_number else str(label)
        return columns


def _class_names(table: Any, label_key: str) -> tuple[str, ...]:
    """The class names that the datasets library stores in the schema; () if there are none."""
    raw = (table.schema_arrow.metadata or {}).get(b"huggingface", b"")
    try:
        names = json.loads(raw)["info"]["features"][label_key]["names"]
    except (ValueError, KeyError, TypeError):
        return ()
    return tuple(map(str, names))
