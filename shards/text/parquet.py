"""Parquet: one row per document. A part is a row group."""

from __future__ import annotations

from collections.abc import Iterator

from d2v_ds.data.checks import Finding, Unusable
from d2v_ds.errors import suggestion
from shards import parquet
from shards.family import Input
from shards.findings import of_error
from shards.text import reading
from shards.text.layout import Document, TextFormat, from_row


class Parquet(TextFormat):
    name = "parquet"
    help = "Parquet, one document per row"
    extensions = (parquet.EXTENSION,)

    def parts(self, file: str) -> Iterator[tuple[Input, int]]:
        groups = list(parquet.row_groups(self.root, file))
        return iter(groups or [(Input(file), 0)])

    def documents(self, part: Input, findings: list[Finding]) -> Iterator[Document]:
        table = parquet.open_table(self.root / part.path)
        names = table.schema_arrow.names
        for key in self.options.keys:
            if key not in names:
                raise Unusable("row", f"has no column {key!r}{suggestion(key, names)}")
        columns = names if self.options.label_key else self.options.keys
        for number, row in parquet.rows(table, part, columns):
            name = f"{part.path}, row {number}"
            try:
                text, about = from_row(row, self.options)
                if len(text) > reading.LONGEST:
                    reason = f"its text is longer than {reading.LONGEST:,} characters"
                    raise Unusable("size", reason)
            except ValueError as error:
                findings.append(of_error(name, error))
            else:
                yield name, text, about
