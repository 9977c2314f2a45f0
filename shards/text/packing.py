"""Documents -> token ids -> the content of a shard: packed blocks, or one labelled sample per row.

    documents of a shard, in order --encode, eos--> one stream of ids --cut--> blocks --> KEY.npy

A member KEY.npy holds up to ROWS blocks [n, block]. One member per block would double the size of a
tar and make reading many times slower. The last block of a shard holds the remaining ids.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from d2v_ds.data.checks import Finding
from d2v_ds.data.tokenizer_json import SENTENCEPIECE_FILE
from shards.encoding import check_text
from shards.family import SPLIT, Converted, Item, PackedMember, Sample
from shards.findings import UNUSABLE, left_out, of_error
from shards.keys import part_key
from shards.plan import split_of
from shards.text.layout import TextLayout
from shards.text.tokenizer import Tokenizer

ROWS = 1_024  # blocks per member
HEADER = 128  # bytes of a .npy header, which numpy pads to a multiple of 64

Ids = npt.NDArray[np.unsignedinteger[Any]]


def id_type(vocab_size: int) -> str:
    """The type that ids are stored as, which is also the name of their field."""
    return "u16" if vocab_size <= 1 << 16 else "u32"


def pack(documents: Iterable[list[int]], block: int, eos: int) -> Iterator[list[int]]:
    """Blocks of exactly `block` ids; the last block may be shorter. Documents follow each other,
    each ended by eos, and may span blocks (--sample-break-mode none in fairseq)."""
    waiting: list[int] = []
    for ids in documents:
        waiting += ids
        waiting.append(eos)
        full = len(waiting) // block * block
        for start in range(0, full, block):
            yield waiting[start : start + block]
        del waiting[:full]
    if waiting:
        yield waiting


@dataclass(frozen=True)
class _TextConverter:
    """A part of a file holds documents of every split, so the converter chooses those of the split
    that the sample is for. A document's split is decided by its name, which holds its position in
    the file, or by the column of --split-by."""

    layout: TextLayout
    model: Path
    tokenizer: dict[str, Any]  # its entry of index.json, without the name of its file
    file: str = field(default=SENTENCEPIECE_FILE, kw_only=True)  # its name in the set
    splits: Mapping[str, float] | None = field(default=None, kw_only=True)  # name: share
    remark: str = field(default="", kw_only=True)  # what the ids do not hold

    modality: ClassVar[str] = "text"
    length_unit: ClassVar[str] = "tokens"
    sample_rate: ClassVar[int] = 0
    knows_inputs: ClassVar[bool] = False

    @property
    def about(self) -> dict[str, Any]:
        about: dict[str, Any] = {"tokenizer": {"file": self.file, **self.tokenizer}}
        return {**about, "remarks": [self.remark]} if self.remark else about

    @property
    def files(self) -> dict[str, Path]:
        return {self.file: self.model}

    @property
    def ids(self) -> str:
        return id_type(self.tokenizer["vocab_size"])

    def encoded(
        self, samples: Iterable[Sample], findings: list[Finding]
    ) -> Iterator[tuple[Sample, Item[str], list[int]]]:
        """(sample, document, ids) of every document of the split that is not empty."""
        tokenizer = Tokenizer.load(self.model)
        split_key = self.layout.options.split_key
        for sample in samples:
            found: list[Finding] = []
            for item in self.layout.read(sample, found):
                if self.splits:
                    value = item.columns[self.column(split_key)] if split_key else item.name
                    if not self.is_in(sample, str(value)):
                        continue
                try:
                    check_text(item.content)
                    ids = self.ids_of(item, tokenizer)
                except UNUSABLE as error:
                    findings.append(of_error(item.name, error))
                    continue
                if ids:
                    yield sample, item, ids
                elif self.layout.options.label_key:  # otherwise it is as a blank line
                    findings.append(Finding(item.name, "contains no text", "empty"))
            findings += (one for one in found if self.is_in(sample, one.name))

    def is_in(self, sample: Sample, value: str) -> bool:
        """Whether the split of a value is the one that the sample is for."""
        return not self.splits or split_of(value, self.splits) == sample.columns[SPLIT]

    def column(self, key: str) -> str:
        """The name of a column of the documents; that of the label is always the same."""
        return "label" if key == self.layout.options.label_key else key

    def ids_of(self, item: Item[str], tokenizer: Tokenizer) -> list[int]:
        """The ids of a document without the last eos; none if it is empty. Raises ValueError."""
        return tokenizer.encode(item.content)


@dataclass(frozen=True)
class PackedText(_TextConverter):
    """Unlabelled text, for pre-training."""

    block: int = 512

    @property
    def fields(self) -> tuple[str, ...]:
        return (self.ids,)

    def convert(self, samples: Iterable[Sample]) -> Iterator[Converted | PackedMember]:
        samples = list(samples)
        findings: list[Finding] = []
        found = 0

        def documents() -> Iterator[list[int]]:
            nonlocal found
            for _, _, ids in self.encoded(samples, findings):
                found += 1
                yield ids

        eos, rows = self.tokenizer["eos_id"], list[list[int]]()
        number = 0
        for block in pack(documents(), self.block, eos):
            if rows and (len(rows) == ROWS or len(block) != self.block):
                yield self.packed(part_key(samples[0].key, number), rows)
                rows, number = [], number + 1
            rows.append(block)
        if rows:
            yield self.packed(part_key(samples[0].key, number), rows)
        yield _rest(samples, findings, found)

    def packed(self, key: str, rows: list[list[int]]) -> PackedMember:
        ids = np.asarray(rows, dtype=f"<{self.ids}".replace("u16", "u2").replace("u32", "u4"))
        payload = npy_bytes(ids)
        size = ids.shape[1] * ids.itemsize
        assert len(payload) == HEADER + ids.size * ids.itemsize
        rows_of_member = tuple(
            (f"{key}/{i}", HEADER + i * size, size, ids.shape[1]) for i in range(len(ids))
        )
        return PackedMember(f"{key}.npy", payload, rows_of_member)


@dataclass(frozen=True)
class LabelledText(_TextConverter):
    """One sample per document, with its label: for probes and fine-tuning.

    pair_key: the column with a second text. The ids of a pair are a </s> </s> b </s>, as RoBERTa
    packs them after the <s> that fine-tuning prepends.
    """

    pair_key: str = ""

    fields: ClassVar[tuple[str, ...]] = ("json", "npy")

    def ids_of(self, item: Item[str], tokenizer: Tokenizer) -> list[int]:
        first = tokenizer.encode(item.content)
        if not self.pair_key:
            return first
        check_text(item.columns[self.pair_key])
        second = tokenizer.encode(item.columns[self.pair_key])
        return [*first, tokenizer.eos_id, tokenizer.eos_id, *second] if first and second else []

    def convert(self, samples: Iterable[Sample]) -> Iterator[Converted]:
        samples = list(samples)
        findings: list[Finding] = []
        eos, number, last, found = self.tokenizer["eos_id"], 0, None, 0
        kind = np.dtype("<u2" if self.ids == "u16" else "<u4")
        for sample, item, ids in self.encoded(samples, findings):
            number = number + 1 if sample is last else 0
            last = sample
            found += 1
            columns = {k: v for k, v in item.columns.items() if k != self.pair_key}
            about = json.dumps({**columns, "path": item.name}).encode()
            ids.append(eos)
            payload = npy_bytes(np.asarray(ids, dtype=kind))
            yield Converted(f"{sample.key}/{number:06d}", (about, payload), len(ids))
        yield _rest(samples, findings, found)


def _rest(samples: list[Sample], findings: list[Finding], used: int) -> Converted:
    """The documents that were left out, and how many more documents than parts there are: fewer, if
    those of other splits are not counted."""
    parts = sum(len(sample.inputs) for sample in samples)
    return Converted("", (), 0, tuple(findings), used + len(left_out(findings)) - parts)


def npy_bytes(ids: Ids) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, ids)
    return buffer.getvalue()
