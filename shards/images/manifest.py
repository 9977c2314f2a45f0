"""A manifest: .csv or .tsv with a header line, .jsonl, or .json with an array of objects. `path`,
or `file_name`, is relative to the manifest; the other columns become columns of the samples. CSV
has quotes (RFC 4180), TSV has none."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from d2v_ds.data.checks import Finding, Unusable
from d2v_ds.errors import UserError, suggestion
from shards.encoding import not_utf8
from shards.family import Input, Sample
from shards.images.labels import label_of, labelled
from shards.images.layout import ImageLayout, ImageOptions, check_label_key
from shards.json_array import DECODER, Repeating, values
from shards.keys import make_key
from shards.tables import LONGEST, check_columns, check_encoding, rows, too_long
from shards.walking import extension_of, size_of

EXTENSIONS = (".csv", ".tsv", ".jsonl", ".ndjson", ".json")
PATHS = ("path", "file_name")
"""Columns that name the image; the second is that of metadata.csv in the datasets library."""


class Manifest(ImageLayout):
    name = "manifest"
    help = ".csv, .tsv, .jsonl or .json with `path` or `file_name`; class = --label-key"
    takes = "file"
    uses = ("label_key",)

    @classmethod
    def recognises(cls, source: Path) -> bool:
        return source.is_file() and extension_of(source.name) in EXTENSIONS

    @classmethod
    def open(cls, source: Path, options: ImageOptions) -> Manifest:
        """Reads the manifest once for the classes; `samples` reads it again."""
        layout = super().open(source, options)
        if not cls.recognises(source):
            raise UserError(f"{source}: a manifest is a {', '.join(EXTENSIONS)} file")
        labels: set[str] = set()
        columns: set[str] = set()
        repeating: list[Finding] = []
        for row in _rows(source, repeating):
            columns |= row.keys()
            label, _ = label_of(row.get(options.label_key))
            labels.add(label)
        if not columns:
            raise UserError(f"{source}: lists no images{_but(repeating)}")
        check_label_key(source, options, columns)
        remarks = ("a column without a name is not kept",) if "" in columns else ()
        return replace(layout, classes=tuple(sorted(labels - {""})), remarks=remarks)

    def samples(self, findings: list[Finding]) -> Iterator[Sample]:
        listed: set[str] = set()
        for row in _rows(self.source, findings):
            path = row.pop("path")
            row.pop("", None)
            place = os.path.normpath(self.root / path)
            if place in listed:
                findings.append(Finding(path, "is listed again", "duplicate"))
                continue
            listed.add(place)
            columns = labelled(row, self.options.label_key) if self.classes else row
            size = size_of(self.root / path)
            yield Sample(make_key(os.path.splitext(path)[0]), (Input(path),), columns, size)


def _but(findings: list[Finding]) -> str:
    return f" that can be used; {findings[0].name} {findings[0].reason}" if findings else ""


def _rows(source: Path, findings: list[Finding]) -> Iterator[dict[str, Any]]:
    """The rows, with `path`. JSON objects that name a key twice are added to `findings`. Raises
    UserError if the manifest is damaged or a row has no path."""
    extension = extension_of(source.name)
    if extension == ".tsv":
        yield from _with_path(source, rows(source, *PATHS))
        return
    check_encoding(source)
    try:
        with source.open(encoding="utf-8-sig", newline="") as file:
            if extension == ".csv":
                yield from _with_path(source, _csv_rows(file, source))
            else:
                yield from _with_path(source, _json_rows(file, source, findings))
    except UnicodeDecodeError:
        raise UserError(f"{source}: {_not_utf8(source.read_bytes())}") from None


def _not_utf8(data: bytes) -> str:
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return str(not_utf8(data, error.start))
    return "has changed while it was read"


def _with_path(
    source: Path, found: Iterable[tuple[int, Mapping[str, Any]]]
) -> Iterator[dict[str, Any]]:
    for number, given in found:
        row = dict(given)
        key = next(filter(row.__contains__, PATHS), PATHS[0])
        path = row.pop(key, None)
        if not isinstance(path, str) or not path or "\0" in path:
            hint = suggestion("path", row) if path is None else f" but {path!r:.60}"
            raise UserError(f"{source}, line {number}: has no `{'` or `'.join(PATHS)}`{hint}")
        yield {"path": path, **row}


def _csv_rows(file: io.TextIOWrapper, source: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, row)."""
    # A quote that nothing closes, or text after a closing one, would join rows.
    table = csv.reader(_lines(file, source), strict=True)
    try:
        header = [name.strip() for name in next(table, [])]
        check_columns(source, header, PATHS, "commas")
        for cells in table:
            if not cells:
                continue
            if len(cells) != len(header):
                raise UserError(
                    f"{source}, line {table.line_num}: {len(cells)} columns, but the header has "
                    f"{len(header)}"
                )
            yield table.line_num, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise UserError(f"{source}, line {table.line_num}: {error}") from None


def _json_rows(
    file: io.TextIOWrapper, source: Path, findings: list[Finding]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, row); of an array, its elements are counted."""
    if extension_of(source.name) == ".json" and file.read(1 << 12).lstrip().startswith("["):
        yield from _elements(source, findings)
        return
    file.seek(0)
    for number, line in enumerate(_lines(file, source), start=1):
        if not line.strip():
            continue
        try:
            row = DECODER.decode(line.removeprefix("\ufeff"))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{source}, line {number}: is not JSON ({error})") from None
        if not isinstance(row, dict):
            raise UserError(f"{source}, line {number}: is not a JSON object")
        if isinstance(row, Repeating):
            findings.append(Finding(f"{source.name}, line {number}", str(row), "row"))
        else:
            yield number, row


def _lines(file: io.TextIOWrapper, source: Path) -> Iterator[str]:
    """Raises UserError for a line that is too long."""
    for number, line in enumerate(iter(lambda: file.readline(LONGEST), ""), start=1):
        if len(line) == LONGEST:
            raise too_long(source, number)
        yield line


def _elements(source: Path, findings: list[Finding]) -> Iterator[tuple[int, dict[str, Any]]]:
    number = 0
    try:
        with source.open("rb") as file:
            for number, row in enumerate(values(file, LONGEST, "strict"), start=1):
                if not isinstance(row, dict):
                    raise UserError(f"{source}, element {number}: is not a JSON object")
                if isinstance(row, Repeating):
                    findings.append(Finding(f"{source.name}, item {number}", str(row), "row"))
                else:
                    yield number, row
    except Unusable as error:
        raise UserError(f"{source}: is not JSON: element {number + 1} {error}") from None
