"""Plain text. --document sets whether a document is a line, a paragraph or a file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from d2v_ds.data.checks import Finding, Unusable
from shards.family import Input
from shards.text import reading
from shards.text.layout import Document
from shards.text.lines import LineFormat, Pieces
from shards.walking import size_of

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

    def parts(self, file: str) -> Iterator[tuple[Input, int]]:
        if self._unfit():
            return iter([(Input(file), size_of(self.root / file))])
        return super().parts(file)

    def documents(self, part: Input, findings: list[Finding]) -> Iterator[Document]:
        # Not an error before the conversion, because --only may not choose the file.
        if reason := self._unfit():
            raise Unusable("label", reason)
        return super().documents(part, findings)

    def _unfit(self) -> str:
        """Why no file can be used with these options; "" if they can."""
        if key := self.options.label_key:
            return (
                f"is plain text and has no labels, but --label-key is {key}; use .jsonl, .json, "
                ".csv, .tsv or .parquet"
            )
        if key := self.options.split_key:
            return (
                f"is plain text and has no columns, but --split-by is {key}; omit --split-by to "
                "split by document"
            )
        return ""

    def document(self, text: str) -> tuple[str, dict[str, Any]]:
        return text, {}
