"""Several SOURCEs as one corpus: each has its own layout, and a prefix before its keys and paths.

    SOURCE ... --find, open--> layouts --Several--> samples with prefixed keys and paths

The prefix is the path of the SOURCE below the folder that all of them share.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, cast

from d2v_ds.data.checks import Finding
from d2v_ds.errors import UserError
from shards.family import Input, Item, Sample
from shards.keys import make_key
from shards.layout import AUTO, AnyLayout, Layout, find


def open_sources(
    layouts: Sequence[type[AnyLayout]],
    name: str,
    sources: Sequence[Path],
    options: Any,
    report: bool = True,
) -> AnyLayout:
    """Opens one SOURCE, or several together, in the layout with this name; "auto" detects that of
    each. report: print the detected ones. Raises UserError."""
    check_apart(sources)
    opened = []
    for source in sources:
        layout = find(layouts, name, source)
        if report and name == AUTO:
            print(f"{source}: layout {layout.name}")
        opened.append(layout.open(source, options))
    if len(opened) == 1:
        return opened[0]
    paths = [Path(os.path.abspath(source)) for source in sources]
    root = Path(os.path.commonpath([path.parent for path in paths]))
    parts = tuple(
        Part(str(path.relative_to(root)), path.is_file(), layout)
        for path, layout in zip(paths, opened, strict=True)
    )
    # Several has what the converters need of the layouts of any family.
    return cast(AnyLayout, Several(root, root, options, parts))


def check_apart(sources: Sequence[Path]) -> None:
    """Raises UserError if a SOURCE is given twice or lies within another one."""
    paths = [source.resolve() for source in sources]
    for i, path in enumerate(paths):
        for j, other in enumerate(paths):
            if i != j and (other in path.parents or (other == path and j < i)):
                where = "is given twice" if other == path else f"lies within {sources[j]}"
                raise UserError(f"{sources[i]}: {where}; its inputs would be used twice")


class Part(NamedTuple):
    """One of several SOURCEs."""

    prefix: str
    is_file: bool
    layout: Layout[Any, Any]

    @property
    def file(self) -> str:
        """Its own name, as inputs and findings have it if it is a tar or a table; "" for a
        folder."""
        return os.path.basename(self.prefix) if self.is_file else ""

    def outer(self, name: str) -> str:
        """The path of an input, or the name of a finding or item, among those of all SOURCEs."""
        if self.file and (name == self.file or name.startswith(f"{self.file}, ")):
            return self.prefix + name[len(self.file) :]
        return f"{self.prefix}/{name}"

    def inner(self, path: str) -> str:
        return self.file if path == self.prefix else path[len(self.prefix) + 1 :]

    def has(self, path: str) -> bool:
        return path == self.prefix or path.startswith(f"{self.prefix}/")

    def identity(self, item: Input) -> int:
        """A hash of the file of an input and of its part. A hash saves memory."""
        path = os.path.abspath(os.path.join(self.layout.root, item.path))
        return hash((path, item.bytes, item.part, item.channel))

    def named(self, findings: Iterable[Finding]) -> list[Finding]:
        return [found._replace(name=self.outer(found.name)) for found in findings]


@dataclass(frozen=True)
class Several(Layout[Any, Any]):
    """The corpora of several SOURCEs."""

    name = "several"
    help = "several SOURCEs, each in one of the layouts above"

    parts: tuple[Part, ...] = ()

    @classmethod
    def recognises(cls, source: Path) -> bool:
        return False

    @property
    def uses(self) -> tuple[str, ...]:
        """Options of d2v-shards images that the layouts use."""
        uses: set[str] = set()
        for part in self.parts:
            uses.update(getattr(part.layout, "uses", ()))
        return tuple(sorted(uses))

    @property
    def classes(self) -> tuple[str, ...]:
        """Classes of images: those of all layouts, sorted; () if one does not know its own."""
        each = [getattr(part.layout, "classes", ()) for part in self.parts]
        if len(set(each)) == 1:
            return tuple(each[0])
        return tuple(sorted({name for names in each for name in names})) if all(each) else ()

    @property
    def remarks(self) -> tuple[str, ...]:
        """What users must know about corpora of images."""
        return tuple(
            f"{part.prefix}: {remark}"
            for part in self.parts
            for remark in getattr(part.layout, "remarks", ())
        )

    @property
    def knows_inputs(self) -> bool:
        return all(part.layout.knows_inputs for part in self.parts)

    def samples(self, findings: list[Finding]) -> Iterator[Sample]:
        # check_apart does not see that a table lists files of another SOURCE.
        given: set[int] | None = set() if any(part.is_file for part in self.parts) else None
        for part in self.parts:
            own: list[Finding] = []
            start = os.path.splitext(part.prefix)[0] if part.is_file else part.prefix
            for sample in part.layout.samples(own):
                if given is not None:
                    identity = part.identity(sample.inputs[0])
                    if identity in given:
                        reason = "an earlier SOURCE has the same input"
                        own.append(Finding(str(sample.inputs[0]), reason, "duplicate"))
                        continue
                    given.add(identity)
                key, at, number = sample.key.partition("@")  # as part_key makes it
                inputs = tuple(item._replace(path=part.outer(item.path)) for item in sample.inputs)
                yield replace(sample, key=make_key(f"{start}/{key}") + at + number, inputs=inputs)
            findings += part.named(own)

    def read(self, sample: Sample, findings: list[Finding]) -> Iterator[Item[Any]]:
        for number, inputs in groupby(sample.inputs, lambda item: self._of(item.path)):
            part = self.parts[number]
            own: list[Finding] = []
            inner = tuple(item._replace(path=part.inner(item.path)) for item in inputs)
            for item in part.layout.read(replace(sample, inputs=inner), own):
                item.name = part.outer(item.name)
                yield item
            findings += part.named(own)

    def file_of(self, item: Input) -> Path | None:
        part = self.parts[self._of(item.path)]
        return part.layout.file_of(item._replace(path=part.inner(item.path)))

    def payload(self, item: Input) -> bytes:
        part = self.parts[self._of(item.path)]
        return part.layout.payload(item._replace(path=part.inner(item.path)))

    def _of(self, path: str) -> int:
        """The number of the part that a path belongs to."""
        return next(i for i, part in enumerate(self.parts) if part.has(path))
