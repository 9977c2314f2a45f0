"""JSON lines: one object per document."""

from __future__ import annotations

import json
from typing import Any

from shards.text import reading
from shards.text.layout import from_row
from shards.text.lines import LineFormat, Pieces


class JsonLines(LineFormat):
    name = "jsonl"
    help = "JSON lines, .jsonl, .ndjson or .json (also .gz, .zst), one document per object"
    extensions = (".jsonl", ".ndjson", ".json")
    compressed = True

    @property
    def pieces(self) -> Pieces:
        return reading.lines

    def document(self, text: str) -> tuple[str, dict[str, Any]]:
        try:
            row = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"is not JSON ({error})") from None
        if not isinstance(row, dict):
            raise ValueError("is not a JSON object")
        return from_row(row, self.options)
