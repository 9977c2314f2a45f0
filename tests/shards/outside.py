"""Layouts outside the package, one per family: examples of what a user writes."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from d2v_ds.data.checks import Finding
from d2v_ds.errors import UserError
from shards.family import Input, Item, Sample
from shards.images.layout import ImageLayout
from shards.keys import make_key, part_key
from shards.speech.layout import SpeechLayout
from shards.text.layout import Document, TextFormat
from shards.walking import size_of


class Kaldi(SpeechLayout):
    """A folder with wav.scp, one line `KEY PATH` per recording. Its items are plain files."""

    name = "kaldi"
    help = "data folder of Kaldi with wav.scp"
    takes = "folder"

    @classmethod
    def recognises(cls, source: Path) -> bool:
        return (source / "wav.scp").is_file()

    def samples(self, findings: list[Finding]) -> Iterator[Sample]:
        for number, line in enumerate((self.root / "wav.scp").read_text().splitlines(), start=1):
            key, _, path = line.partition(" ")
            if not path:
                findings.append((f"wav.scp, line {number}", "is not KEY PATH"))
                continue
            size = size_of(self.root / path)
            yield Sample(make_key(key), (Input(path),), {"speaker": key.split("-")[0]}, size)


class Records(ImageLayout):
    """A file of grey images of 8 x 8 pixels: 64 bytes each, after one byte with the class. A sample
    of the plan holds many items."""

    name = "records"
    help = "file of grey images of 8 x 8 pixels (.records)"
    takes = "file"
    size = 65
    together = 10

    @classmethod
    def recognises(cls, source: Path) -> bool:
        return source.suffix == ".records"

    def samples(self, findings: list[Finding]) -> Iterator[Sample]:
        end = self.source.stat().st_size // self.size * self.size
        if not end:
            raise UserError(f"{self.source}: contains no records")
        step = self.size * self.together
        for i, start in enumerate(range(0, end, step)):
            size = min(step, end - start)
            yield Sample(f"records-{i}", (Input(self.source.name, (start, size)),), {}, size)

    def read(self, sample: Sample, findings: list[Finding]) -> Iterator[Item[bytes]]:
        for part in super().read(sample, findings):
            for i in range(len(part.content) // self.size):
                record = part.content[i * self.size :][: self.size]
                file = io.BytesIO()
                Image.frombytes("L", (8, 8), record[1:]).save(file, "PNG")
                columns = {"label": str(record[0])}
                yield Item(part_key(sample.key, i), f"{part.name}, {i}", file.getvalue(), columns)


class Markdown(TextFormat):
    """One document per heading. As a file format, it is also read from mixed folders."""

    name = "markdown"
    help = "Markdown (.md), one document per heading"
    extensions = (".md",)

    def documents(self, part: Input, findings: list[Finding]) -> Iterator[Document]:
        text = (self.root / part.path).read_text(encoding="utf-8")
        for i, section in enumerate(text.split("\n# ")):
            yield f"{part.path}, section {i}", section, {}
