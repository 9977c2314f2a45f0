"""Base classes of all text layouts, and the options that they depend on.

    file or folder --parts--> inputs (byte ranges between documents, row groups)
    input --documents--> (name, text, columns), one after the other

A part is the unit that one process reads at a time, so its size only limits the work that is lost
if the process is killed. Text is UTF-8 and stays unchanged, except for a byte order mark and the
ends of lines, which become newlines.
"""

from __future__ import annotations

import json
import math
import os
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

from d2v_ds.data.checks import Finding, Unusable
from d2v_ds.errors import UserError, suggestion
from shards.family import Input, Item, Sample
from shards.findings import of_error
from shards.keys import make_key, part_key
from shards.layout import Layout
from shards.links import unbroken
from shards.text.compressed import COMPRESSED
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
    split_key: str = ""  # of the value that decides about the split; "": the document's name

    @cached_property
    def keys(self) -> list[str]:
        """The keys that every row must have."""
        keys = (self.text_key, self.pair_key, self.label_key, self.split_key)
        return [key for key in dict.fromkeys(keys) if key]

    @cached_property
    def quoted_keys(self) -> list[str]:
        """The same, as JSON has them."""
        return [json.dumps(key, ensure_ascii=False) for key in self.keys]


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
    """Whether compressed files of the format are read too."""

    unlabelled: ClassVar[bool] = True
    """Whether the layout `folder` reads files of the format if no labels are asked for. A table
    beside texts rarely holds documents."""

    @classmethod
    def has_name(cls, name: str) -> bool:
        """Whether a file name has one of the extensions."""
        return (inner_extension(name) if cls.compressed else extension_of(name)) in cls.extensions

    @classmethod
    def recognises(cls, source: Path) -> bool:
        return source.is_file() and cls.has_name(source.name)

    @classmethod
    def kinds(cls) -> str:
        """The extensions, for messages."""
        return ", ".join(cls.extensions) + (" (also compressed)" if cls.compressed else "")

    def samples(self, findings: list[Finding]) -> Iterator[Sample]:
        if self.source.is_file():
            yield from self.samples_of(self.source.name)
            return
        files = wanted(self.root, walk(self.root, findings), self.has_name, self.kinds(), findings)
        for file in unbroken(self.root, files, findings):
            for sample in self.samples_of(file.path):
                yield replace(sample, place=file.place)

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
        OSError or ValueError rejects the rest of the part."""

    def read(self, sample: Sample, findings: list[Finding]) -> Iterator[Item[str]]:
        for part in sample.inputs:
            before, found = len(findings), False
            try:
                for name, text, columns in self.documents(part, findings):
                    found = found or bool(text or columns)  # an empty text is as a blank line
                    yield Item(sample.key, name, text, columns)
            except UserError:  # a package is missing
                raise
            except (Unusable, OSError, MemoryError) as error:
                findings.append(of_error(str(part), error))
            except ValueError as error:
                findings.append(Finding(str(part), f"cannot be read ({error})", "damaged"))
            if not found and len(findings) == before:
                findings.append(Finding(str(part), "contains no text", "empty"))


def inner_extension(name: str) -> str:
    """The extension of a file name without that of its compression."""
    if extension_of(name) in COMPRESSED:
        name = os.path.splitext(name)[0]
    return extension_of(name)


def from_row(row: Mapping[str, Any], options: TextOptions) -> tuple[str, dict[str, Any]]:
    """(text, columns) of a row. Raises Unusable if the row lacks a text or a label."""
    for key in options.keys:
        if key not in row:
            raise Unusable("row", f"has no {key!r}{suggestion(key, row)}")
    text, split_key = row[options.text_key], options.split_key
    for key in (options.text_key, options.pair_key):
        if key and not isinstance(row[key], str):
            raise Unusable("row", f"{key!r} is not text but {type(row[key]).__name__}")
    if split_key and not is_scalar(row[split_key]):
        raise Unusable("row", f"{split_key!r} is neither text nor a number: {row[split_key]!r:.40}")
    if not options.label_key:
        return text, {split_key: row[split_key]} if split_key else {}
    label = row[options.label_key]
    if not is_scalar(label) or label == "":
        what = type(label).__name__ if label is None or not isinstance(label, SCALAR) else label
        raise Unusable(
            "label", f"{options.label_key!r} is neither text nor a number: {what or 'empty'}"
        )
    columns = {
        key: value
        for key, value in row.items()
        if key and is_scalar(value) and key not in (options.text_key, options.label_key)
    }
    return text, {**columns, "label": label}


def is_scalar(value: Any) -> bool:
    """Whether a value is text or a finite number."""
    return isinstance(value, SCALAR) and (not isinstance(value, float) or math.isfinite(value))
