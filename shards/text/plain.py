"""Plain text. --document sets whether a document is a line, a paragraph or a file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from d2v_ds.data.checks import Finding
from d2v_ds.errors import UserError
from shards.family import Input
from shards.text import reading
from shards.text.layout import Document
from shards.text.lines import LineFormat, Pieces

PIECES: dict[str, Pieces] = {
    "line": reading.lines,
    "blank-line": reading.paragraphs,
    "file": reading.whole,
}


class PlainText(LineFormat):
    name = "txt"
    help = "plain text, .txt, .text, .md or .rst (also compressed); documents as set by --document"
    extensions = (".txt", ".text", ".md", ".rst")
    compressed = True

    @property
    def pieces(self) -> Pieces:
        return PIECES[self.options.document]

    def documents(self, part: Input, findings: list[Finding]) -> Iterator[Document]:
        # Not before the conversion, because --only may not choose the file.
        if key := self.options.label_key:
            raise UserError(
                f"--label-key {key}: {part.path} is plain text and has no labels; use .jsonl, "
                ".json, .csv, .tsv or .parquet"
            )
        if key := self.options.split_key:
            raise UserError(
                f"--split-by {key}: {part.path} is plain text and has no columns; omit --split-by "
                "to split by document"
            )
        return super().documents(part, findings)

    def document(self, text: str) -> tuple[str, dict[str, Any]]:
        return text, {}
