"""The types that connect corpus families and the conversion.

SOURCE --Layout (shards/layout.py)--> Corpus(samples, converter) --shards/plan.py--> plan
samples of a shard --Converter.convert--> Converted, PackedMember --shards/core.py--> its tar
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from d2v_ds.data.checks import Finding

Rejected = Finding  # the former name, for layouts outside this package
SPLIT = "split"  # the column of a sample with documents of several splits: the one it is read for
Content = TypeVar("Content")  # bytes of a recording or image, str of a document


class Input(NamedTuple):
    """A file, or a part of one."""

    path: str  # relative to the root of the layout
    bytes: tuple[int, int] | None = None  # (offset, size) within the file: a member of a tar
    part: tuple[float, float] | None = None
    """(start, end): seconds of a recording as float, rows of a table as int."""
    channel: int | None = None  # of a recording, from 0, if the corpus names one
    seconds: float | None = None  # duration of a recording that the corpus states, of all of it

    @property
    def is_file(self) -> bool:
        """Whether it is a whole file, about which the corpus says nothing."""
        return self[1:] == (None, None, None, None)

    @property
    def of_recording(self) -> bool:
        """Whether it is a segment or a channel of a recording, which others may share."""
        return isinstance(self.part and self.part[0], float) or self.channel is not None

    @property
    def rows(self) -> int:
        """The number of inputs of the corpus that it stands for: rows of a table, or 1."""
        if self.part and isinstance(self.part[0], int):
            return int(self.part[1]) - self.part[0]
        return 1

    def __str__(self) -> str:
        """Its name in quarantine.jsonl."""
        name = self.path
        if self.bytes:
            name += f", bytes {self.bytes[0]} to {sum(self.bytes)}"
        if self.part:
            name += f", {self.part[0]:g} to {self.part[1]:g}"
        if self.channel is not None:
            name += f", channel {self.channel}"
        return name


@dataclass(frozen=True, slots=True)
class Sample:
    """The inputs of one sample of a set, or of several samples if the converter divides them."""

    key: str
    inputs: tuple[Input, ...]
    columns: dict[str, Any]  # metadata from the corpus
    size: int  # of the inputs, in bytes
    place: tuple[int, int] | None = None
    """Of its file, the same for all links to it; None if unknown. Only for planning."""


@dataclass(slots=True)  # not frozen, which would slow down reading short documents
class Item(Generic[Content]):
    """One recording, image or document, as a layout reads it from the inputs of a sample."""

    key: str  # of the sample in the set; text numbers its documents itself
    name: str  # in quarantine.jsonl
    content: Content
    columns: Mapping[str, Any]  # metadata
    part: tuple[float, float] | None = None  # of a recording; these three are as in Input
    channel: int | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Converted:
    """One sample of a set, or only findings."""

    key: str
    members: tuple[bytes | None, ...]  # payloads in the order of the converter's fields; (): none
    length: int
    findings: tuple[Finding, ...] = ()
    found: int = 0
    """Inputs beyond those in the plan: documents of a file, rows of a table, parts of a recording;
    or fewer."""


@dataclass(frozen=True)
class PackedMember:
    """A member of the tar that holds many samples of one field: blocks of text."""

    name: str  # of the member, with its extension
    payload: bytes
    rows: tuple[tuple[str, int, int, int], ...]  # (key, offset in the payload, bytes, length)
    findings: tuple[Finding, ...] = ()
    found: int = 0


class Converter(Protocol):
    """Converts the samples of one corpus. Holds only settings, because it is pickled for the worker
    processes."""

    @property
    def modality(self) -> str: ...
    @property
    def length_unit(self) -> str: ...
    @property
    def fields(self) -> tuple[str, ...]:
        """Fields of the index, sorted."""

    @property
    def sample_rate(self) -> int:
        """In Hz; 0 if the modality has no sample rate."""

    @property
    def about(self) -> dict[str, Any]:
        """Further entries of index.json, for example on the tokenizer."""

    @property
    def files(self) -> dict[str, Path]:
        """Files that are copied into the set, by their names in the set."""

    @property
    def knows_inputs(self) -> bool:
        """Whether the plan has every input, so that too many bad ones can stop the conversion
        early; False if samples are read as many inputs: documents of a file, rows of a table, parts
        of a recording."""

    def convert(self, samples: Iterable[Sample]) -> Iterator[Converted | PackedMember]:
        """Converts all samples of a shard. Every input is used or reported in `findings`; unusable
        inputs never raise."""


@dataclass(frozen=True)
class Corpus:
    """A corpus, ready to be planned and converted."""

    samples: Iterable[Sample]  # in an order that depends only on the corpus
    converter: Converter
    options: dict[str, Any]  # that determine the content, by their names on the command line
    arrange: Callable[[list[Sample]], list[Sample]] | None = None  # rearranges a split: --join
    findings: list[Finding] = field(default_factory=list)
    """Files and inputs that give no sample; grows while `samples` is iterated."""
    divided: bool = False
    """Whether the converter chooses the documents of a split, by Sample.columns[SPLIT]."""
