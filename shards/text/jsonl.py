"""JSON: one object per line, or an array of objects; an object is a document."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from typing import Any

from d2v_ds.data.checks import Finding, Unusable
from shards import json_array
from shards.encoding import BOM, HEAD
from shards.family import Input
from shards.findings import of_error
from shards.text import reading
from shards.text.layout import Document, from_row, inner_extension
from shards.text.lines import LineFormat, Pieces


class JsonLines(LineFormat):
    name = "jsonl"
    help = (
        "JSON lines or an array, .jsonl, .ndjson or .json (also compressed), objects are documents"
    )
    extensions = (".jsonl", ".ndjson", ".json")
    compressed = True

    @property
    def pieces(self) -> Pieces:
        return reading.rows

    def document(self, text: str) -> tuple[str, dict[str, Any]]:
        # Looking at the pairs of every row would take several percent of a conversion.
        repeated = False  # whether a key that is read may occur twice
        for key in self.options.quoted_keys:
            repeated = repeated or text.count(key) > 1
        try:
            row = json_array.DECODER.decode(text) if repeated else json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise Unusable("row", f"is not JSON ({error})") from None
        return self.from_value(row)

    def from_value(self, row: Any) -> tuple[str, dict[str, Any]]:
        return from_row(json_array.row_of(row, self.options.keys), self.options)

    def divisible(self, file: io.BufferedReader, path: str) -> bool:
        """Whether each object is one line, judged by the first line."""
        head = file.peek(HEAD)[:HEAD].removeprefix(BOM).lstrip()
        if head.startswith(b"["):
            return inner_extension(path) != ".json"  # an array in one line of .jsonl is no document
        line = head.partition(b"\n")[0].rstrip()
        return not line.endswith((b"{", b",", b":", b"["))

    def pieces_of(
        self, file: io.BufferedReader, part: Input, findings: list[Finding]
    ) -> Iterator[Document]:
        if part.bytes or self.divisible(file, part.path):
            yield from super().pieces_of(file, part, findings)
            return
        for number, row in enumerate(json_array.values(file, reading.LONGEST)):
            name = f"{part.path}, item {number}"
            try:
                text, columns = self.from_value(row)
            except ValueError as error:
                findings.append(of_error(name, error))
            else:
                yield name, text, columns
