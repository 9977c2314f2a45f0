"""Parquet with recordings as Hugging Face stores them: a column `audio` that holds a struct of
bytes and path, only bytes, or only a path (https://huggingface.co/docs/hub/datasets-audio). The
other columns with text and numbers become columns; numbers of classes become their names.

A sample of the plan is a row group.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from d2v_ds.data.checks import Finding, Unusable
from d2v_ds.errors import UserError
from shards import parquet
from shards.family import Input, Item, Sample
from shards.findings import UNUSABLE, of_error
from shards.keys import make_key, part_key
from shards.speech.layout import SpeechLayout, is_packed, packed_files
from shards.speech.rows import OTHER_PATHS, PATHS
from shards.walking import check_file

SCALAR = (str, int, float, bool)
NAMES = ("audio", *PATHS, *OTHER_PATHS, "wav", "flac", "mp3", "speech", "sound")
"""Columns that may hold the recordings, the first one first."""


@dataclass(frozen=True)
class Parquet(SpeechLayout):
    name = "parquet"
    help = "Parquet with a column `audio` as Hugging Face stores it: a file or a folder"

    column: str = ""
    """The column with the recordings."""

    @classmethod
    def recognises(cls, source: Path) -> bool:
        return is_packed(source, parquet.EXTENSION)

    @classmethod
    def open(cls, source: Path, options: None) -> Parquet:
        """Reads the schema of the first readable file."""
        layout = super().open(source, options)
        for file in layout.files([]):
            try:
                schema = parquet.open_table(layout.root / file).schema_arrow
            except UserError:
                raise
            except ValueError:  # the conversion reports the reason
                continue
            column = _column_of(schema)
            if not column:
                raise UserError(
                    f"{layout.root / file}: has no column with recordings, such as `audio` "
                    f"(columns: {', '.join(schema.names)})"
                )
            return replace(layout, column=column)
        return layout

    def files(self, findings: list[Finding]) -> Iterator[str]:
        return packed_files(self.source, parquet.EXTENSION, findings)

    def samples(self, findings: list[Finding]) -> Iterator[Sample]:
        for file in self.files(findings):
            stem = os.path.splitext(file)[0]
            for i, (part, size) in enumerate(parquet.row_groups(self.root, file)):
                yield Sample(make_key(f"{stem}-{i}"), (part,), {}, size)

    def read(self, sample: Sample, findings: list[Finding]) -> Iterator[Item[bytes]]:
        """The rows of a row group, or of several that --join combines."""
        for part in sample.inputs:
            try:
                yield from self._rows(sample.key, part, findings)
            except UNUSABLE as error:
                findings.append(of_error(str(part), error))

    def _rows(self, key: str, part: Input, findings: list[Finding]) -> Iterator[Item[bytes]]:
        table = parquet.open_table(self.root / part.path)
        names = table.schema_arrow.names
        if self.column not in names:
            raise Unusable("row", f"has no column {self.column!r} (columns: {', '.join(names)})")
        classes = parquet.class_names(table)
        folder = os.path.dirname(part.path)
        for number, row in parquet.rows(table, part, names):
            name = f"{part.path}, row {number}"
            try:
                content = self._content(row.pop(self.column), folder)
                columns, reasons = _columns(row, classes)
            except UNUSABLE as error:
                findings.append(of_error(name, error))
            else:
                findings += [Finding(name, reason, "no metadata") for reason in reasons]
                yield Item(part_key(key, number), name, content, columns)

    def _content(self, cell: Any, folder: str) -> bytes:
        """Raises Unusable, and OSError if a file cannot be read."""
        path = cell
        if isinstance(cell, dict):
            path = cell.get("path")
            cell = cell.get("bytes") or path
        if isinstance(cell, bytes):
            return cell
        if not isinstance(path, str) or not path:
            raise Unusable("empty", f"its {self.column!r} holds neither bytes nor a path")
        file = self.root / folder / path
        check_file(file)
        return file.read_bytes()


def _column_of(schema: Any) -> str:
    """The column with recordings; "" if there is none."""
    fitting = [name for name in schema.names if parquet.may_hold_files(schema.field(name).type)]
    structs = [name for name in fitting if str(schema.field(name).type).startswith("struct")]
    named = [name for name in NAMES if name in fitting]
    return next(iter([*named, *structs]), "")


def _columns(
    row: Mapping[str, Any], classes: Mapping[str, tuple[str, ...]]
) -> tuple[dict[str, Any], list[str]]:
    """(the text and numbers of a row, why it has none in a column of classes)."""
    columns, reasons = {}, []
    for name, value in row.items():
        if name in classes and (value is None or isinstance(value, int)):
            names = classes[name]
            if value is None or value == -1:  # Hugging Face's mark for an unknown class
                reasons.append(f"has no {name} ({value}): kept without it")
                continue
            if not 0 <= value < len(names):
                reasons.append(
                    f"its {name} is {value}, not one of the {len(names)} classes: kept without it"
                )
                continue
            value = names[value]
        if isinstance(value, SCALAR):
            columns[name] = value
    return columns, reasons
