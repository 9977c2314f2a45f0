"""Parquet with an image column as Hugging Face stores it: a struct of bytes and path, and a label
that is a name or the number of a class (https://huggingface.co/docs/hub/datasets-image).

Each file may define other class names, so numbers become names file by file. A sample of the plan
is a row group.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from d2v_ds.data.checks import Finding, Unusable
from d2v_ds.errors import UserError, suggestion
from shards import parquet
from shards.family import Item, Sample
from shards.findings import UNUSABLE, of_error
from shards.images.labels import NO_LABEL, labelled
from shards.images.layout import (
    ImageLayout,
    ImageOptions,
    check_label_key,
    pass_over_others,
)
from shards.keys import make_key, part_key
from shards.parquet import EXTENSION
from shards.splits import split_of_path
from shards.walking import extension_of, folders, walk


@dataclass(frozen=True)
class Parquet(ImageLayout):
    name = "parquet"
    help = "Parquet as Hugging Face stores images; class = the column of --label-key"
    uses = ("label_key", "image_key")

    @classmethod
    def recognises(cls, source: Path) -> bool:
        if source.is_dir():
            return any(extension_of(n) == EXTENSION for _, names in folders(source) for n in names)
        return extension_of(source.name) == EXTENSION

    @classmethod
    def open(cls, source: Path, options: ImageOptions) -> Parquet:
        """Reads the schemas of all files; the conversion reports the files that are damaged."""
        layout = super().open(source, options)
        key = options.image_key
        classes: dict[str, None] = {}  # an ordered set
        columns: dict[str, None] = {}
        unread: set[str] = set()
        files = layout._files()
        for file in files:
            try:
                table = parquet.open_table(file)
            except UserError:
                raise
            except ValueError:
                continue
            names = table.schema_arrow.names
            columns |= dict.fromkeys(names)
            unread |= set(parquet.binary_columns(table)) - {key}
            classes |= dict.fromkeys(parquet.class_names(table).get(options.label_key, ()))
        if columns and key not in columns:
            raise UserError(
                f"--image-key: {source} has no column {key!r}{suggestion(key, columns)}"
            )
        if columns:
            check_label_key(source, options, columns)
        remarks = tuple(f"the column {name} is not kept" for name in sorted(unread))
        return replace(layout, classes=tuple(classes), remarks=remarks)

    def _files(self) -> list[Path]:
        if not self.source.is_dir():
            return [self.source]
        names = (file.path for file in walk(self.source) if extension_of(file.name) == EXTENSION)
        files = sorted(self.source / name for name in names)
        if not files:
            raise UserError(f"{self.source}: contains no {EXTENSION} file")
        return files

    def samples(self, findings: list[Finding]) -> Iterator[Sample]:
        files = self._files()
        if self.source.is_dir():
            pass_over_others(self.source, files, findings)
        for file in files:
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
                raise Unusable("row", f"has no column {key!r} (columns: {', '.join(names)})")
            classes = parquet.class_names(table).get(self.options.label_key)
            unread = set(parquet.binary_columns(table)) - {key}
            split = split_of_path(part.path)
            for number, row in parquet.rows(table, part, [n for n in names if n not in unread]):
                name = f"{part.path}, row {number}"
                image = row.pop(key)
                data = image.get("bytes") if isinstance(image, dict) else image
                if not isinstance(data, bytes):
                    path = image.get("path") if isinstance(image, dict) else image
                    only = f" but the path {path!r:.60}" if isinstance(path, str) else ""
                    findings.append(Finding(name, f"{key!r} contains no bytes{only}", "row"))
                    continue
                columns = self._columns(row, classes)
                if split:
                    columns.setdefault("split", split)
                yield Item(part_key(sample.key, number), name, data, columns)
        except UNUSABLE as error:
            findings.append(of_error(str(part), error))

    def _columns(self, row: dict[str, Any], classes: tuple[str, ...] | None) -> dict[str, Any]:
        """The columns of a row as JSON can hold them. classes: of its file; None: it states
        none."""
        key = self.options.label_key
        columns = {
            name: plain for name, value in row.items() if (plain := _plain(value)) is not None
        }
        if key not in row:
            return columns
        if classes is None and self.classes and not isinstance(row[key], str):
            label = columns.pop(key, None)
            reason = f"its file does not say which class its label {label} is"
            return {k: v for k, v in columns.items() if k != "label"} | {NO_LABEL: reason}
        return labelled(columns | {key: row[key]}, key, classes or (self.classes or None))


def _plain(value: Any) -> Any:
    """A value as JSON can hold it; None if it has no content."""
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, list):
        return [_plain(one) for one in value]
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    return str(value)  # dates, decimal numbers
