"""The contract of a family of corpora: what it hands over, and what it makes of that.

SOURCE --the family's read--> Corpus(samples, converter)
the samples of a shard --Converter.convert--> Converted, Table --core--> members of its tar
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

Rejected = tuple[str, str]  # name of an input, reason


class Input(NamedTuple):
    """A file, or a part of one."""

    path: str  # relative to the corpus
    bytes: tuple[int, int] | None = None  # (first, number) of the file: a member of a tar, say
    part: tuple[float, float] | None = None  # (from, to) of what is stored there: seconds, rows

    def __str__(self) -> str:
        """Its name in quarantine.jsonl."""
        name = self.path
        if self.bytes:
            name += f", bytes {self.bytes[0]} to {sum(self.bytes)}"
        if self.part:
            name += f", {self.part[0]:g} to {self.part[1]:g}"
        return name


@dataclass(frozen=True, slots=True)
class Sample:
    """What one sample of a set is made from; or several, where the converter divides it."""

    key: str
    inputs: tuple[Input, ...]
    columns: dict[str, Any]  # what the corpus says about it
    size: int  # of the inputs, bytes


@dataclass(frozen=True)
class Converted:
    """One sample of a set, or none of it but what was left out."""

    key: str
    members: tuple[bytes | None, ...]  # payloads in the order of the converter's fields; (): none
    length: int
    rejected: tuple[Rejected, ...] = ()
    unwanted: tuple[Rejected, ...] = ()  # left out because an option says so; --max-bad ignores it
    found: int = 0  # inputs beyond the planned ones: documents in a file, rows of a table


@dataclass(frozen=True)
class Table:
    """A member of the tar that holds many samples of one field: blocks of text."""

    name: str  # of the member, with its extension
    payload: bytes
    rows: tuple[tuple[str, int, int, int], ...]  # (key, first byte in the payload, bytes, length)
    rejected: tuple[Rejected, ...] = ()
    unwanted: tuple[Rejected, ...] = ()
    found: int = 0


class Converter(Protocol):
    """Of one corpus family; it travels to the worker processes, so it holds settings only."""

    @property
    def modality(self) -> str: ...
    @property
    def length_unit(self) -> str: ...
    @property
    def fields(self) -> tuple[str, ...]:
        """Of the index, sorted."""

    @property
    def sample_rate(self) -> int:
        """0 where there is no such thing."""

    @property
    def about(self) -> dict[str, Any]:
        """What index.json says besides: of the tokenizer, say."""

    @property
    def files(self) -> dict[str, Path]:
        """Files that are copied into the set, by their names there."""

    def convert(self, samples: Iterable[Sample]) -> Iterator[Converted | Table]:
        """What a shard is made of, all samples of it. Inputs that cannot be used are in `rejected`;
        it never raises for them, and every input is used or rejected."""


@dataclass(frozen=True)
class Corpus:
    """What a family of corpora hands over."""

    samples: Iterable[Sample]  # in an order that depends on the corpus alone
    converter: Converter
    options: dict[str, Any]  # that decide on the content, by their name on the command line
    arrange: Callable[[list[Sample]], list[Sample]] | None = None  # joins those of a split, say
    rejected: list[Rejected] = field(
        default_factory=list
    )  # what no sample can be made of; grows while `samples` are read
