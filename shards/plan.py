"""Assigns samples to the shards of each split: a pure function of the inputs and options.

    Corpus (samples of a layout) -> chosen -> split -> arranged -> ConversionPlan of each split

Corpora have millions of inputs. The samples of a plan therefore stay encoded, as one line of JSON
each, until their shard is written. A sample takes about twice the length of its path.
"""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from d2v_ds.data.checks import Finding
from d2v_ds.errors import UserError, suggestion
from shards import choosing
from shards.family import SPLIT, Corpus, Input, Sample
from shards.findings import first_reasons, left_out, normalised, unusable
from shards.keys import make_key
from shards.links import once
from shards.splits import StatedSplits

CONVERTER = 4  # increase it if the same inputs and options give different bytes than before
MIN_SHARD = 4_000_000  # bytes; smaller shards are not worth a process
SHARDS_AT_LEAST = 16
ENCODER = json.JSONEncoder(ensure_ascii=False)
DECODER = json.JSONDecoder()


@dataclass(frozen=True)
class Choice:
    """Options of every family: the part of a corpus that is converted, and the sets."""

    seed: int = 0
    shard_size: int = 256_000_000
    only: Sequence[str] = ()  # files and patterns, as choosing.py reads them
    leave_out: Sequence[str] = ()
    splits: Mapping[str, float] | None = None
    split_by: str = ""  # a column; "": split by the key

    @property
    def options(self) -> dict[str, Any]:
        options: dict[str, Any] = {"shard-size": self.shard_size, "seed": self.seed}
        if self.only:
            options["only"] = choosing.options(self.only)
        if self.leave_out:
            options["except"] = choosing.options(self.leave_out)
        if self.splits:
            options |= {"split": dict(self.splits), "split-by": self.split_by}
        return options


class Samples:
    """A compact, ordered list of samples."""

    def __init__(self, samples: Iterable[Sample] = ()) -> None:
        self._blob = bytearray()
        self._ends = array("Q")
        self.sizes = array("Q")
        self.inputs = array("I")  # number of inputs per sample
        self.shared = bytearray()  # 1: the sample is a segment or channel of a recording
        for sample in samples:
            self.append(sample)

    def __len__(self) -> int:
        return len(self._ends)

    def append(self, sample: Sample) -> None:
        inputs = [i.path if i.is_file else i for i in sample.inputs]
        row = [sample.key, inputs, sample.columns, sample.size]
        encoded = ENCODER.encode(row).encode("utf-8", "surrogateescape")
        shared = len(inputs) == 1 and inputs[0] is sample.inputs[0] and inputs[0].of_recording
        self._append(encoded, sample.size, len(inputs), shared)

    def _append(self, row: bytes, size: int, inputs: int, shared: int) -> None:
        self._blob += row
        self._ends.append(len(self._blob))
        self.sizes.append(size)
        self.inputs.append(inputs)
        self.shared.append(shared)

    def selected(self, numbers: Iterable[int], keys: Mapping[int, str]) -> Samples:
        """Samples by number. Those in `keys` get a new key, the others stay encoded."""
        result = Samples()
        for i in numbers:
            if i in keys:
                result.append(replace(self[i], key=keys[i]))
            else:
                result._append(self.row(i), self.sizes[i], self.inputs[i], self.shared[i])
        return result

    def row(self, i: int) -> bytes:
        return bytes(self._blob[self._ends[i - 1] if i else 0 : self._ends[i]])

    def key(self, i: int) -> str:
        row = self.row(i).decode("utf-8", "surrogateescape")
        key: str = DECODER.raw_decode(row, 1)[0]  # decodes only the first element of the list
        return key

    def __iter__(self) -> Iterator[Sample]:
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, i: int) -> Sample:
        key, inputs, columns, size = json.loads(self.row(i).decode("utf-8", "surrogateescape"))
        return Sample(key, tuple(map(_input, inputs)), columns, size)


def _input(raw: Any) -> Input:
    if isinstance(raw, str):
        return Input(raw)
    path, byte_range, part, channel, seconds = raw
    byte_range = tuple(byte_range) if byte_range else None
    return Input(path, byte_range, tuple(part) if part else None, channel, seconds)


@dataclass(frozen=True)
class ConversionPlan:
    """The assignment of samples to the shards of a set."""

    options: dict[str, Any]
    samples: Samples
    order: Any  # int64 [n] array of sample numbers
    bounds: array[int]  # shard i holds order[bounds[i] : bounds[i + 1]]
    keys: dict[int, str]  # {sample number: key} of samples whose own key is not unique
    findings: tuple[Finding, ...] = ()  # files and inputs that give no sample
    not_chosen: int = 0  # inputs that --only and --except leave out
    remark: str = ""  # a sentence about the chosen samples that a user must know

    @property
    def shards(self) -> int:
        return len(self.bounds) - 1

    @property
    def inputs(self) -> int:
        return sum(self.samples.inputs)

    @property
    def bytes(self) -> int:
        return sum(self.samples.sizes)

    def shard(self, i: int) -> Samples:
        """Encoded, which is cheap to send to a worker."""
        return self.samples.selected(self._row_of(i), self.keys)

    def inputs_of(self, i: int) -> int:
        return sum(self.samples.inputs[j] for j in self._row_of(i))

    def hash(self) -> str:
        digest = hashlib.sha256(json.dumps([CONVERTER, self.options]).encode())
        for i in range(self.shards):
            digest.update(b"\0")
            for j in self._row_of(i):
                digest.update(self.samples.row(j) + b"\n")
        # Not what was passed over, which OUT itself may be part of when a conversion resumes.
        digest.update(json.dumps(left_out(self.findings)).encode())
        return digest.hexdigest()

    def _row_of(self, i: int) -> Iterator[int]:
        return map(int, self.order[self.bounds[i] : self.bounds[i + 1]])


def make_plans(corpus: Corpus, choice: Choice) -> dict[str, ConversionPlan]:
    """{name of the split: plan}; without splits, the name is "". Raises UserError."""
    chooser = choosing.Chooser(choice.only, choice.leave_out)
    names = list(choice.splits) if choice.splits else [""]
    sets = {name: Samples() for name in names}
    stated = StatedSplits()
    for sample in once(chooser.chosen(corpus.samples), corpus.findings):
        stated.add(sample)
        for name, assigned in _assigned(sample, corpus, choice):
            sets[name].append(assigned)
    findings = chooser.findings(normalised(corpus.findings))
    plans: dict[str, ConversionPlan] = {}
    for name, samples in sets.items():
        if not len(samples):
            raise UserError(_why_empty(name, findings, chooser.not_chosen))
        if corpus.arrange:
            samples = Samples(corpus.arrange(list(samples)))
        options = {**corpus.options, **choice.options}
        if name:
            options["split"] = {name: options["split"]}
        plan = make_plan(samples, options, choice.shard_size, choice.seed)
        plans[name] = replace(plan, remark=stated.remark)
    # What gives no sample has no key to split by. In a small set it might exceed --max-bad.
    largest = max(names, key=lambda name: (choice.splits or {}).get(name, 1))
    plans[largest] = replace(
        plans[largest], findings=tuple(findings), not_chosen=chooser.not_chosen
    )
    return plans


def without_out(
    plans: Mapping[str, ConversionPlan], sources: Sequence[Path], out: Path
) -> dict[str, ConversionPlan]:
    """The plans without findings about OUT, which lies below a SOURCE only when a conversion
    resumes."""
    above = [path.parent if len(sources) > 1 or path.is_file() else path for path in sources]
    root = Path(os.path.commonpath(list(map(os.path.abspath, above))))
    own = out.resolve()

    def is_own(found: Finding) -> bool:
        if found.kind != "shard set":
            return False
        place = (root / found.name).resolve()
        return place == own or own in place.parents

    return {
        name: replace(plan, findings=tuple(f for f in plan.findings if not is_own(f)))
        for name, plan in plans.items()
    }


def _assigned(sample: Sample, corpus: Corpus, choice: Choice) -> Iterator[tuple[str, Sample]]:
    """(split, sample): one, or one for every split if documents of the sample are in all of
    them."""
    if not choice.splits:
        yield "", sample
    elif not corpus.divided:
        yield split_of(_split_value(sample, choice.split_by), choice.splits), sample
    else:
        for name, share in choice.splits.items():
            size = max(1, int(share * sample.size))
            yield name, replace(sample, columns={**sample.columns, SPLIT: name}, size=size)


def _why_empty(name: str, findings: Sequence[Finding], not_chosen: int) -> str:
    reasons = first_reasons(unusable(findings))
    if name:
        more = f"; left out: {reasons}" if reasons else ""
        return f"--split: no input falls into {name!r}; increase its share{more}"
    if reasons:
        return f"none of the inputs can be used: {reasons}"
    if not_chosen:
        return f"--only and --except leave none of {not_chosen:,} inputs; change them"
    return "SOURCE contains no inputs"


def make_plan(
    samples: Samples, options: dict[str, Any], shard_size: int, seed: int
) -> ConversionPlan:
    """Shuffles the samples and cuts them into shards of about `shard_size` bytes of input, or of
    less if there would be fewer than SHARDS_AT_LEAST. The segments of a recording stay together, in
    their order. Does not depend on the number of processes."""
    sort_keys = array("Q")
    for i in range(len(samples)):
        sort_keys.append(sort_key(samples.key(i), seed))
    order = np.argsort(np.frombuffer(sort_keys, np.uint64), kind="stable")
    keys = _unique(samples, sort_keys, order)
    continues = np.zeros(len(samples), bool)
    if any(samples.shared):
        order, continues = _together(samples, sort_keys, seed)
    limit = min(shard_size, max(MIN_SHARD, sum(samples.sizes) // SHARDS_AT_LEAST))
    bounds, filled = array("Q", [0]), 0
    for at, j in enumerate(order):
        if filled >= limit and (filled >= shard_size or not continues[at]):
            bounds.append(at)
            filled = 0
        filled += samples.sizes[j]
    bounds.append(len(order))
    return ConversionPlan(options, samples, order, bounds, keys)


def _together(samples: Samples, sort_keys: array[int], seed: int) -> tuple[Any, Any]:
    """(order, whether a sample continues the recording of the one before). Recordings are shuffled
    with the other samples; their segments follow one another by start, so that the conversion reads
    each recording once."""
    first = np.array(sort_keys, np.uint64)
    starts, ends, channels = np.zeros((3, len(samples)))
    shared = np.frombuffer(samples.shared, bool)
    for i in map(int, np.flatnonzero(shared)):
        [segment] = samples[i].inputs
        first[i] = sort_key(segment.path, seed)
        starts[i], ends[i] = segment.part or (0.0, 0.0)
        channels[i] = segment.channel or 0
    order = np.lexsort((channels, ends, starts, first))
    ordered = first[order]
    continues = np.zeros(len(samples), bool)
    continues[1:] = (ordered[1:] == ordered[:-1]) & shared[order[1:]]
    return order, continues


def sort_key(key: str, seed: int) -> int:
    """Defines a pseudorandom order, so that a corpus sorted by speaker or class yields mixed
    shards. A hash of seed and key, because the sequences of random generators may change between
    versions."""
    text = f"{seed}/{key}".encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def _unique(samples: Samples, sort_keys: array[int], order: Any) -> dict[int, str]:
    """Adds a hash to keys that several samples have (a.b.wav and a_b.wav; a.wav and a.flac). Such
    samples are neighbours in the order, so a table of all keys is not needed."""
    keys: dict[int, str] = {}
    used: set[str] = set()
    ordered = np.frombuffer(sort_keys, np.uint64)[order]
    for at in np.flatnonzero(ordered[1:] == ordered[:-1]):
        for j in map(int, order[at : at + 2]):
            if j in keys:  # the second of three equal keys
                continue
            sample = samples[j]
            names = "\0".join(map(str, sample.inputs))
            key = make_key(sample.key, apart=names)
            if key in used:  # the same input is listed twice
                key = make_key(sample.key, apart=f"{names}\0{j}")
            used.add(key)
            keys[j] = key
    return keys


# ---------------------------------------------------------------------------------------- selection


def split_of(value: str, shares: Mapping[str, float]) -> str:
    """The split that a key (or a speaker ...) belongs to. It depends only on the hash of the value,
    so a sample keeps its split when the corpus grows."""
    digest = hashlib.blake2b(value.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    point, passed = int.from_bytes(digest, "little") / 2**64, 0.0
    for name, share in shares.items():
        passed += share
        if point < passed:
            return name
    return name  # the shares sum to 1, except for rounding


def _split_value(sample: Sample, column: str) -> str:
    if not column:
        return sample.key
    if column not in sample.columns:
        raise UserError(
            f"--split-by {column}: {sample.inputs[0]} has no such column"
            f"{suggestion(column, sample.columns)}"
        )
    return str(sample.columns[column])
