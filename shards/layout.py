"""The contract of corpus layouts: how a corpus is stored, and how its samples are found and read.

    SOURCE --recognises--> class --open--> Layout --samples--> the plan
    samples of a shard --read, in a worker process--> items: recordings, images or documents

A layout is one class in a file of its own and one line in the LAYOUTS of its family
(shards/speech, shards/images, shards/text). `--layout`, its help and the detection use that table.
Code outside the package adds a layout in the same way: `shards.speech.LAYOUTS.insert(0, Mine)`.
"""

from __future__ import annotations

import argparse
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, TypeVar

from d2v_ds.data.checks import Finding, Unusable
from d2v_ds.errors import UserError
from shards.family import Content, Input, Item, Sample
from shards.findings import UNUSABLE, of_error
from shards.tars import refuse_compressed
from shards.walking import SPECIAL, check_file

AUTO = "auto"
LARGEST = 1 << 33  # bytes of a recording or image that is read as a whole

Options = TypeVar("Options")  # the family's options that layouts depend on
AnyLayout = TypeVar("AnyLayout", bound="Layout[Any, Any]")


@dataclass(frozen=True)
class Layout(ABC, Generic[Options, Content]):
    """An opened corpus. Holds only settings, because it is pickled for the worker processes.

    A subclass that lacks a method or an attribute without a default fails when the class is
    defined; the error names what is missing. An intermediate class is declared with
    `abstract=True`.
    """

    name: ClassVar[str]
    """The name in --layout."""

    help: ClassVar[str]
    """One line for --help, without a full stop."""

    takes: ClassVar[Literal["file", "folder", "file or folder"]] = "file or folder"
    """The allowed kind of SOURCE; `open` checks it."""

    required: ClassVar[tuple[str, ...]] = ("name", "help")
    """Attributes that every layout of this kind sets."""

    source: Path
    """SOURCE of the command line."""

    root: Path
    """The folder that the paths of inputs are relative to."""

    options: Options

    def __init_subclass__(cls, *, abstract: bool = False, **more: Any) -> None:
        super().__init_subclass__(**more)
        if abstract:
            return
        missing = [name for name in cls.required if not getattr(cls, name, "")]
        missing += [
            name
            for name in dir(cls)
            if getattr(getattr(cls, name, None), "__isabstractmethod__", False)
        ]
        if missing:
            raise TypeError(f"layout {cls.__name__} lacks {', '.join(missing)}")

    @classmethod
    @abstractmethod
    def recognises(cls, source: Path) -> bool:
        """Whether an existing SOURCE looks like this layout. Must be cheap. Several layouts may
        recognise the same source; the first one in the table is used."""

    @classmethod
    def open(cls: type[AnyLayout], source: Path, options: Any) -> AnyLayout:
        """Opens an existing SOURCE. Raises UserError if it does not have this layout."""
        if (source.is_dir() and cls.takes == "file") or (
            source.is_file() and cls.takes == "folder"
        ):
            found = "folder" if source.is_dir() else "file"
            raise UserError(f"{source}: is a {found}; --layout {cls.name} takes a {cls.takes}")
        return cls(source, source if source.is_dir() else source.parent, options)

    @abstractmethod
    def samples(self, findings: list[Finding]) -> Iterator[Sample]:
        """The samples of the corpus, in an order that depends only on the corpus.

        Every other file is appended to `findings` with the reason and the kind: inputs that give
        no sample, and files that are no inputs. Raises UserError for problems that affect the
        whole corpus, such as a manifest without a column `path`."""

    def read(self, sample: Sample, findings: list[Finding]) -> Iterator[Item[Content]]:
        """Reads the inputs of a sample; runs in a worker process.

        The default yields the content of each input, a file or a byte range of one, with the
        columns of the sample. Unreadable inputs are appended to `findings`."""
        for item in sample.inputs:
            try:
                content: Any = self.payload(item)
            except UNUSABLE as error:
                findings.append(of_error(str(item), error))
            else:
                about = item.part, item.channel, item.seconds
                yield Item(sample.key, str(item), content, sample.columns, *about)

    @property
    def knows_inputs(self) -> bool:
        """Whether the plan has every input, so that too many bad ones stop the conversion early.
        A layout overrides this if it has its own `read` and yields one item per input."""
        return type(self).read is Layout.read

    def file_of(self, item: Input) -> Path | None:
        """The file that holds an input; None if `read` does more than read it."""
        return self.root / item.path if type(self).read is Layout.read else None

    def payload(self, item: Input) -> bytes:
        """The bytes of an input. Raises OSError, and Unusable if it is no file, too large, or ends
        early."""
        path = self.root / item.path
        check_file(path)
        offset, size = item.bytes or (0, path.stat().st_size)
        if size > LARGEST:
            raise Unusable("size", f"has {size:,} bytes, more than {LARGEST:,}; divide it")
        if item.bytes is None:
            return path.read_bytes()
        with path.open("rb") as file:
            file.seek(offset)
            data = file.read(size)
        if len(data) != size:
            raise Unusable("truncated", f"ends {size - len(data)} bytes early")
        return data


# -------------------------------------------------------------------------------- table of a family


def detect(layouts: Sequence[type[AnyLayout]], source: Path) -> type[AnyLayout] | None:
    """The first layout that recognises SOURCE, None if there is none."""
    return next((layout for layout in layouts if layout.recognises(source)), None)


def find(layouts: Sequence[type[AnyLayout]], name: str, source: Path) -> type[AnyLayout]:
    """The layout with this name, or the detected one for "auto". Raises UserError."""
    if not source.exists():
        raise UserError(f"{source}: no such file or folder")
    if not source.is_file() and not source.is_dir():
        raise UserError(f"{source}: {SPECIAL}; SOURCE must be a file or a folder")
    refuse_compressed(source)
    if name != AUTO:
        return next(layout for layout in layouts if layout.name == name)
    layout = detect(layouts, source)
    if layout is None:
        names = ", ".join(layout.name for layout in layouts)
        raise UserError(f"{source}: its layout is not recognised; set --layout ({names})")
    return layout


def add_argument(
    parser: argparse._ActionsContainer, layouts: Sequence[type[Layout[Any, Any]]]
) -> None:
    parser.add_argument(
        "--layout",
        choices=(AUTO, *(layout.name for layout in layouts)),
        default=AUTO,
        metavar="NAME",
        help="layout of SOURCE, see the list below (%(default)s: detected)",
    )


def help_of(layouts: Sequence[type[Layout[Any, Any]]]) -> str:
    """A section of --help: one line per layout."""
    width = max(len(layout.name) for layout in layouts)
    lines = (f"  {layout.name:<{width}}  {layout.help}" for layout in layouts)
    return "layouts:\n" + "\n".join(lines)
