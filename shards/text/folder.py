"""A folder tree with files of any text format, recognised by their extensions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from d2v_ds.data.checks import Finding
from d2v_ds.errors import UserError
from shards.family import Item, Sample
from shards.links import unbroken
from shards.text.layout import TextFormat, TextLayout, TextOptions
from shards.walking import walk, wanted

TABLE = "a table is read with --label-key, or if it is SOURCE"


def is_table(name: str) -> bool:
    """Whether folders hold files of this format for other purposes, such as metadata, so that they
    are only read for labelled text."""
    from shards.text import LAYOUTS

    formats = [one for one in LAYOUTS if issubclass(one, TextFormat) and not one.unlabelled]
    return any(one.has_name(name) for one in formats)


@dataclass(frozen=True)
class Folder(TextLayout):
    name = "folder"
    help = "folder tree with files of one or more of the formats above"
    takes = "folder"

    formats: tuple[TextFormat, ...] = ()
    """The formats in the table of the family that folders may hold, opened."""

    @classmethod
    def recognises(cls, source: Path) -> bool:
        return source.is_dir()

    @classmethod
    def open(cls, source: Path, options: TextOptions) -> Folder:
        from shards.text import LAYOUTS

        formats = [
            layout.open(source, options)
            for layout in LAYOUTS
            if issubclass(layout, TextFormat) and (layout.unlabelled or options.label_key)
        ]
        return replace(super().open(source, options), formats=tuple(formats))

    def _format(self, name: str) -> TextFormat | None:
        return next((one for one in self.formats if one.has_name(name)), None)

    def samples(self, findings: list[Finding]) -> Iterator[Sample]:
        kinds = ", ".join(one.kinds() for one in self.formats)
        others: list[Finding] = []
        files = wanted(
            self.root,
            walk(self.root, findings),
            lambda name: self._format(name) is not None,
            kinds,
            others,
        )
        try:
            for file in unbroken(self.root, files, findings):
                found = self._format(file.name)
                assert found
                for sample in found.samples_of(file.path):
                    yield replace(sample, place=file.place)
        except UserError as error:  # there is no text
            tables = {TABLE for one in others if is_table(one.name)}
            raise UserError("; ".join([str(error), *tables])) from None
        findings += (one._replace(reason=TABLE) if is_table(one.name) else one for one in others)

    def read(self, sample: Sample, findings: list[Finding]) -> Iterator[Item[str]]:
        found = self._format(sample.inputs[0].path)
        assert found
        yield from found.read(sample, findings)
