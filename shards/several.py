"""Several SOURCEs as one corpus: each has its own layout, and a prefix before its keys and paths.

    SOURCE ... --find, open--> layouts --Several--> samples with prefixed keys and paths

The prefix is the path of the SOURCE below the folder that all of them share.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, cast

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
    prefixes = [str(path.relative_to(root)) for path in paths]
    parts = tuple(zip(prefixes, opened, strict=True))
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


@dataclass(frozen=True)
class Several(Layout[Any, Any]):
    """The corpora of several SOURCEs."""

    name = "several"
    help = "several SOURCEs, each in one of the layouts above"

    parts: tuple[tuple[str, Layout[Any, Any]], ...] = ()
    """(prefix, layout) of each SOURCE."""

    @classmethod
    def recognises(cls, source: Path) -> bool:
        return False

    @property
    def uses(self) -> tuple[str, ...]:
        """Options of d2v-shards images that the layouts use."""
        return tuple(sorted({name for _, layout in self.parts for name in _uses(layout)}))

    @property
    def classes(self) -> tuple[str, ...]:
        """Classes of images: those of all layouts, sorted; () if one does not know its own."""
        each = [getattr(layout, "classes", ()) for _, layout in self.parts]
        if len(set(each)) == 1:
            return tuple(each[0])
        return tuple(sorted({name for names in each for name in names})) if all(each) else ()

    def samples(self, findings: list[Finding]) -> Iterator[Sample]:
        for prefix, layout in self.parts:
            own: list[Finding] = []
            start = os.path.splitext(prefix)[0] if layout.source.is_file() else prefix
            for sample in layout.samples(own):
                key, part, number = sample.key.partition("@")  # as part_key makes it
                inputs = tuple(
                    item._replace(path=f"{prefix}/{item.path}") for item in sample.inputs
                )
                key = make_key(f"{start}/{key}") + part + number
                yield replace(sample, key=key, inputs=inputs)
            findings += [found._replace(name=_named(prefix, found.name)) for found in own]

    def read(self, sample: Sample, findings: list[Finding]) -> Iterator[Item[Any]]:
        for number, inputs in groupby(sample.inputs, lambda item: self._of(item.path)):
            prefix, layout = self.parts[number]
            own: list[Finding] = []
            inner = replace(sample, inputs=tuple(_without(prefix, item) for item in inputs))
            for item in layout.read(inner, own):
                item.name = _named(prefix, item.name)
                yield item
            findings += [found._replace(name=_named(prefix, found.name)) for found in own]

    def payload(self, item: Input) -> bytes:
        prefix, layout = self.parts[self._of(item.path)]
        return layout.payload(_without(prefix, item))

    def _of(self, path: str) -> int:
        """The number of the part that a path belongs to."""
        return next(i for i, (prefix, _) in enumerate(self.parts) if path.startswith(prefix + "/"))


def _uses(layout: Layout[Any, Any]) -> tuple[str, ...]:
    return tuple(getattr(layout, "uses", ()))


def _without(prefix: str, item: Input) -> Input:
    return item._replace(path=item.path[len(prefix) + 1 :])


def _named(prefix: str, name: str) -> str:
    """The name of a finding or item; absolute paths stay as they are."""
    return name if name.startswith("/") else f"{prefix}/{name}"
