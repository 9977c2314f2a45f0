"""Base classes of all text layouts, and the options that they depend on.

    file or folder --parts--> inputs (byte ranges between documents, row groups)
    input --documents--> (name, text, columns), one after the other

A part is the unit that one process reads at a time, so its size only limits the work that is lost
if the process is killed. Text is UTF-8 and stays unchanged, except for a byte order mark and the
newline that ends a line.
"""

from __future__ import annotations

import os
import zlib
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from d2v_ds.data.checks import Finding
from d2v_ds.errors import UserError, suggestion
from shards.family import Input, Item, Sample
from shards.findings import of_error
from shards.keys import make_key, part_key
from shards.layout import Layout
from shards.text.reading import COMPRESSED
from shards.walking import extension_of, size_of, walk, wanted

Document = tuple[str, str, dict[str, Any]]  # name in quarantine.jsonl, text, columns
SCALAR = (str, int, float)


@dataclass(frozen=True)
class TextOptions:
    """Options of d2v-shards text that layouts depend on."""

    document: Literal["line", "blank-line", "file"] = "line"  # in .txt
    text_key: str = "text"
    label_key: str = ""  # "": no labels
    pair_key: str = ""  # of the second text; "": single texts
    columns: tuple[str, ...] = ()  # of a table without a header line

    @property
    def keys(self) -> list[str]:
        """The keys that every row must have."""
        return [key for key in (self.text_key, self.pair_key, self.label_key) if key]


class TextLayout(Layout[TextOptions, str], abstract=True):
    """An item holds a document; its column "label" is the label if --label-key is given, and the
    column that --pair-key names the second text."""

    @abstractmethod
    def read(self, sample: Sample, findings: list[Finding]) -> Iterator[Item[str]]:
        """The documents of a sample."""


class TextFormat(TextLayout, abstract=True):
    """A layout of one file format: a single file, or all files of the format below a folder."""

    required = (*TextLayout.required, "extensions")

    extensions: ClassVar[tuple[str, ...]]
    """With the dot, in lower case."""

    compressed: ClassVar[bool] = False
    """Whether .gz and .zst files of the format are read too."""

    in_folders: ClassVar[bool] = True
    """Whether the layout `folder` reads files of the format."""

    @classmethod
    def has_name(cls, name: str) -> bool:
        """Whether a file name has one of the extensions."""
        if cls.compressed and extension_of(name) in COMPRESSED:
            name = os.path.splitext(name)[0]
        return extension_of(name) in cls.extensions

    @classmethod
    def recognises(cls, source: Path) -> bool:
        return source.is_file() and cls.has_name(source.name)

    @classmethod
    def kinds(cls) -> str:
        """The extensions, for messages."""
        return ", ".join(cls.extensions) + (" (also .gz, .zst)" if cls.compressed else "")

    def samples(self, findings: list[Finding]) -> Iterator[Sample]:
        if self.source.is_file():
            yield from self.samples_of(self.source.name)
            return
        files = walk(self.root, findings)
        for path, _, _ in wanted(self.root, files, self.has_name, self.kinds(), findings):
            yield from self.samples_of(path)

    def samples_of(self, file: str) -> Iterator[Sample]:
        """One sample per part of a file, whose path is relative to the root."""
        key = make_key(file)
        for i, (part, size) in enumerate(self.parts(file)):
            yield Sample(part_key(key, i), (part,), {}, size)

    def parts(self, file: str) -> Iterator[tuple[Input, int]]:
        """(part, bytes) of a file; the default is the whole file."""
        yield Input(file), size_of(self.root / file)

    @abstractmethod
    def documents(self, part: Input, findings: list[Finding]) -> Iterator[Document]:
        """The documents of a part. Unusable ones are appended to `findings` with the reason; an
        OSError, EOFError, ValueError or zlib.error rejects the rest of the part."""

    def read(self, sample: Sample, findings: list[Finding]) -> Iterator[Item[str]]:
        for part in sample.inputs:
            try:
                for name, text, columns in self.documents(part, findings):
                    yield Item(sample.key, name, text, columns)
            except UserError:  # a package is missing
                raise
            except OSError as error:
                findings.append(of_error(str(part), error))
            except (EOFError, ValueError, zlib.error) as error:
                findings.append(
                    Finding(str(part), f"cannot be read to its end ({error})", "damaged")
                )


def from_row(row: Mapping[str, Any], options: TextOptions) -> tuple[str, dict[str, Any]]:
    """(text, columns) of a row. Raises ValueError if the row lacks a text or a label."""
    text_key, label_key = options.text_key, options.label_key
    for key in options.keys:
        if key not in row:
            raise ValueError(f"has no {key!r}{suggestion(key, row)}")
    text = row[text_key]
    for key in filter(None, (text_key, options.pair_key)):
        if not isinstance(row[key], str):
            raise ValueError(f"{key!r} is not text but {type(row[key]).__name__}")
    if not label_key:
        return text, {}
    label = row[label_key]
    if not isinstance(label, SCALAR):
        raise ValueError(f"{label_key!r} is neither text nor a number: {type(label).__name__}")
    columns = {
        key: value
        for key, value in row.items()
        if isinstance(value, SCALAR) and key not in (text_key, label_key)
    }
    return text, {**columns, "label": label}
