"""A manifest: .csv or .tsv with a header line, or .jsonl. `path` is relative to the manifest; the
other columns become columns of the samples."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from d2v_ds.data.checks import Finding
from d2v_ds.errors import UserError, suggestion
from shards.family import Input, Sample
from shards.images.layout import ImageLayout, ImageOptions
from shards.keys import make_key
from shards.walking import extension_of, size_of

EXTENSIONS = (".csv", ".tsv", ".jsonl")


class Manifest(ImageLayout):
    name = "manifest"
    help = f"{', '.join(EXTENSIONS)} with a column `path`; class = the column of --label-key"
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
        empty = True
        for row in _rows(source):
            empty = False
            if options.label_key in row:
                labels.add(str(row[options.label_key]))
        if empty:
            raise UserError(f"{source}: lists no images")
        return replace(layout, classes=tuple(sorted(labels)))

    def samples(self, findings: list[Finding]) -> Iterator[Sample]:
        label_key = self.options.label_key
        for row in _rows(self.source):
            path = row["path"]
            columns = {key: value for key, value in row.items() if key not in ("path", label_key)}
            if label_key in row:
                columns["label"] = str(row[label_key])
            size = size_of(self.root / path)
            yield Sample(make_key(os.path.splitext(path)[0]), (Input(path),), columns, size)


def _rows(source: Path) -> Iterator[dict[str, Any]]:
    """Raises UserError if the manifest is damaged or a row has no path."""
    read = _json_rows if extension_of(source.name) == ".jsonl" else _csv_rows
    try:
        with source.open(encoding="utf-8-sig", newline="") as file:
            for number, row in read(file, source):
                path = row.get("path")
                if not isinstance(path, str) or not path or "\0" in path:
                    raise UserError(
                        f"{source}, line {number}: has no `path`{suggestion('path', row)}"
                    )
                yield row
    except UnicodeDecodeError as error:
        raise UserError(f"{source}: is not UTF-8 ({error})") from None


def _csv_rows(file: io.TextIOWrapper, source: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, row)."""
    rows = csv.reader(file, delimiter="\t" if extension_of(source.name) == ".tsv" else ",")
    try:
        header = next(rows, [])
        if "path" not in header or len(set(header)) != len(header):
            raise UserError(
                f"{source}: the first line must name the columns, including `path`, without "
                f"duplicates; found {', '.join(header) or 'none'}"
            )
        for cells in rows:
            if not cells:
                continue
            if len(cells) != len(header):
                raise UserError(
                    f"{source}, line {rows.line_num}: {len(cells)} columns, but the header has "
                    f"{len(header)}"
                )
            yield rows.line_num, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise UserError(f"{source}, line {rows.line_num}: {error}") from None


def _json_rows(file: io.TextIOWrapper, source: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, row)."""
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{source}, line {number}: is not JSON ({error})") from None
        if not isinstance(row, dict):
            raise UserError(f"{source}, line {number}: is not a JSON object")
        yield number, row
