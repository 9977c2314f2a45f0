"""Documents -> token ids -> what a shard holds: blocks packed full, or one labelled sample a row.

    documents of a shard, in order --encode, eos--> one stream of ids --cut--> blocks --> KEY.npy

A member KEY.npy holds up to ROWS blocks [n, block]; one a member would double a tar and cost 25
times as much to read. The last block of a shard is as long as what is left for it.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from shards.family import Converted, Sample, Table
from shards.keys import part_key
from shards.text.sources import Rejected, TextSource
from shards.tokenizer import Tokenizer

MODEL_FILE = "tokenizer.model"  # in a set
ROWS = 1_024  # blocks of a member
HEADER = 128  # bytes of a .npy header: numpy pads it to a multiple of 64

Ids = npt.NDArray[np.unsignedinteger[Any]]


def id_type(vocab_size: int) -> str:
    """What ids are stored as, and the name of the field that holds them."""
    return "u16" if vocab_size <= 1 << 16 else "u32"


def pack(documents: Iterable[list[int]], block: int, eos: int) -> Iterator[list[int]]:
    """Blocks of exactly `block` ids, the last with the rest: the documents in order, each ended by
    eos, with no regard to where a block ends (fairseq's --sample-break-mode none)."""
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
    source: TextSource
    model: Path
    tokenizer: dict[str, Any]  # what index.json says of it

    modality: ClassVar[str] = "text"
    length_unit: ClassVar[str] = "tokens"
    sample_rate: ClassVar[int] = 0

    @property
    def about(self) -> dict[str, Any]:
        return {"tokenizer": {"file": MODEL_FILE, **self.tokenizer}}

    @property
    def files(self) -> dict[str, Path]:
        return {MODEL_FILE: self.model}

    @property
    def ids(self) -> str:
        return id_type(self.tokenizer["vocab_size"])

    def encoded(
        self, samples: Iterable[Sample], rejected: list[Rejected]
    ) -> Iterator[tuple[Sample, str, list[int], dict[str, Any]]]:
        """(part, name, ids, columns) of every document that has something in it."""
        tokenizer = Tokenizer.load(self.model)
        for sample in samples:
            for part in sample.inputs:
                for name, text, columns in self.source.documents(part, rejected):
                    try:
                        ids = tokenizer.encode(text)
                    except ValueError as error:
                        rejected.append((name, str(error)))
                        continue
                    if ids:
                        yield sample, name, ids, columns
                    elif columns:
                        rejected.append((name, "has no text in it"))


@dataclass(frozen=True)
class PackedText(_TextConverter):
    """Unlabelled text, for pre-training."""

    block: int = 512

    @property
    def fields(self) -> tuple[str, ...]:
        return (self.ids,)

    def convert(self, samples: Iterable[Sample]) -> Iterator[Converted | Table]:
        samples = list(samples)
        rejected: list[Rejected] = []
        found = 0

        def documents() -> Iterator[list[int]]:
            nonlocal found
            for _, _, ids, _ in self.encoded(samples, rejected):
                found += 1
                yield ids

        eos, rows = self.tokenizer["eos_id"], list[list[int]]()
        number = 0
        for block in pack(documents(), self.block, eos):
            if rows and (len(rows) == ROWS or len(block) != self.block):
                yield self.table(part_key(samples[0].key, number), rows)
                rows, number = [], number + 1
            rows.append(block)
        if rows:
            yield self.table(part_key(samples[0].key, number), rows)
        yield _rest(samples, rejected, found)

    def table(self, key: str, rows: list[list[int]]) -> Table:
        ids = np.asarray(rows, dtype=f"<{self.ids}".replace("u16", "u2").replace("u32", "u4"))
        payload = npy_bytes(ids)
        size = ids.shape[1] * ids.itemsize
        assert len(payload) == HEADER + ids.size * ids.itemsize
        places = tuple(
            (f"{key}/{i}", HEADER + i * size, size, ids.shape[1]) for i in range(len(ids))
        )
        return Table(f"{key}.npy", payload, places)


@dataclass(frozen=True)
class LabelledText(_TextConverter):
    """One sample a document, with its label: for probes and fine-tuning."""

    fields: ClassVar[tuple[str, ...]] = ("json", "npy")

    def convert(self, samples: Iterable[Sample]) -> Iterator[Converted]:
        samples = list(samples)
        rejected: list[Rejected] = []
        eos, number, last, found = self.tokenizer["eos_id"], 0, None, 0
        kind = np.dtype("<u2" if self.ids == "u16" else "<u4")
        for sample, name, ids, columns in self.encoded(samples, rejected):
            number = number + 1 if sample is last else 0
            last = sample
            found += 1
            about = json.dumps({**columns, "path": name}).encode()
            ids.append(eos)
            payload = npy_bytes(np.asarray(ids, dtype=kind))
            yield Converted(f"{sample.key}/{number:06d}", (about, payload), len(ids))
        yield _rest(samples, rejected, found)


def _rest(samples: list[Sample], rejected: list[Rejected], used: int) -> Converted:
    """What was left out, and by how much the documents outnumber the files they came from."""
    parts = sum(len(sample.inputs) for sample in samples)
    return Converted("", (), 0, tuple(rejected), found=max(0, used + len(rejected) - parts))


def npy_bytes(ids: Ids) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, ids)
    return buffer.getvalue()
