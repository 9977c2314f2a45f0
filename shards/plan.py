"""Which sample goes into which shard of which split: a pure function of the inputs and options.

    Corpus (samples as a layout reads them) -> chosen -> split -> arranged -> Plan of each split

Corpora have millions of inputs, so the samples of a plan stay encoded, a line of JSON each, until
the shard that they belong to is made: about twice the length of a path for each.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from d2v_ds.errors import UserError, suggestion
from shards.family import Corpus, Input, Sample
from shards.keys import make_key

CONVERTER = 2  # raised when the same inputs and options begin to give other bytes
MIN_SHARD = 4_000_000  # bytes; smaller corpora are not cut up for the sake of parallelism
SHARDS_AT_LEAST = 16
ENCODER = json.JSONEncoder(ensure_ascii=False)
DECODER = json.JSONDecoder()


@dataclass(frozen=True)
class Choice:
    """What of a corpus is taken, and how it is cut into sets; the options of every family."""

    seed: int = 0
    shard_size: int = 256_000_000
    only: Path | None = None  # lists of keys or paths
    leave_out: Path | None = None
    splits: Mapping[str, float] | None = None
    split_by: str = ""  # a column; "": the key

    @property
    def options(self) -> dict[str, Any]:
        options: dict[str, Any] = {"shard-size": self.shard_size, "seed": self.seed}
        if self.only:
            options["only"] = _digest_of(self.only)
        if self.leave_out:
            options["except"] = _digest_of(self.leave_out)
        if self.splits:
            options |= {"split": dict(self.splits), "split-by": self.split_by}
        return options


class Samples:
    """Many of them in little memory; they come out as they went in, and in that order."""

    def __init__(self, samples: Iterable[Sample] = ()) -> None:
        self._blob = bytearray()
        self._ends = array("Q")
        self.sizes = array("Q")
        self.inputs = array("I")  # their number, for each sample
        for sample in samples:
            self.append(sample)

    def __len__(self) -> int:
        return len(self._ends)

    def append(self, sample: Sample) -> None:
        inputs = [i.path if i.bytes is i.part is None else i for i in sample.inputs]
        row = [sample.key, inputs, sample.columns, sample.size]
        encoded = ENCODER.encode(row).encode("utf-8", "surrogateescape")
        self._append(encoded, sample.size, len(sample.inputs))

    def _append(self, row: bytes, size: int, inputs: int) -> None:
        self._blob += row
        self._ends.append(len(self._blob))
        self.sizes.append(size)
        self.inputs.append(inputs)

    def taken(self, places: Iterable[int], keys: Mapping[int, str]) -> Samples:
        """Those at these places, some with another key; the others are not decoded."""
        result = Samples()
        for i in places:
            if i in keys:
                result.append(replace(self[i], key=keys[i]))
            else:
                result._append(self.row(i), self.sizes[i], self.inputs[i])
        return result

    def row(self, i: int) -> bytes:
        return bytes(self._blob[self._ends[i - 1] if i else 0 : self._ends[i]])

    def key(self, i: int) -> str:
        row = self.row(i).decode("utf-8", "surrogateescape")
        key: str = DECODER.raw_decode(row, 1)[0]  # the first in the list, and no more
        return key

    def __iter__(self) -> Iterator[Sample]:
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, i: int) -> Sample:
        key, inputs, columns, size = json.loads(self.row(i).decode("utf-8", "surrogateescape"))
        return Sample(key, tuple(map(_input, inputs)), columns, size)


def _input(raw: Any) -> Input:
    if isinstance(raw, str):
        return Input(raw)
    path, stretch, part = raw
    return Input(path, tuple(stretch) if stretch else None, tuple(part) if part else None)


@dataclass(frozen=True)
class Plan:
    """Which sample of a set goes where."""

    options: dict[str, Any]
    samples: Samples
    order: Any  # int64 [n] array, of samples
    bounds: array[int]  # of the shards in `order`, one more than there are
    keys: dict[int, str]  # by sample, of those that would share one with another
    rejected: tuple[tuple[str, str], ...] = ()  # inputs that no sample can be made of, reasons

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
        """Still encoded, so that it travels to a worker at little cost."""
        return self.samples.taken(self._row_of(i), self.keys)

    def inputs_of(self, i: int) -> int:
        return sum(self.samples.inputs[j] for j in self._row_of(i))

    def hash(self) -> str:
        digest = hashlib.sha256(json.dumps([CONVERTER, self.options]).encode())
        for i in range(self.shards):
            digest.update(b"\0")
            for j in self._row_of(i):
                digest.update(self.samples.row(j) + b"\n")
        digest.update(json.dumps(self.rejected).encode())
        return digest.hexdigest()

    def _row_of(self, i: int) -> Iterator[int]:
        return map(int, self.order[self.bounds[i] : self.bounds[i + 1]])


def make_plans(corpus: Corpus, choice: Choice) -> dict[str, Plan]:
    """The plan of each split by its name, or of the one set by the name "". Raises UserError."""
    chosen = _chosen(corpus.samples, choice)
    names = list(choice.splits) if choice.splits else [""]
    sets = {name: Samples() for name in names}
    for sample in chosen:
        name = ""
        if choice.splits:
            name = split_of(_split_value(sample, choice.split_by), choice.splits)
        sets[name].append(sample)
    plans: dict[str, Plan] = {}
    for name, samples in sets.items():
        if not len(samples):
            raise UserError(
                f"--split: no input falls into {name!r}; give it a larger share"
                if name
                else "nothing of the corpus is chosen (--only, --except)"
            )
        if corpus.arrange:
            samples = Samples(corpus.arrange(list(samples)))
        options = {**corpus.options, **choice.options}
        if name:
            options["split"] = {name: options["split"]}
        plans[name] = make_plan(samples, options, choice.shard_size, choice.seed)
    first = names[0]  # which an input would have been in nobody can tell
    plans[first] = replace(plans[first], rejected=tuple(corpus.rejected))
    return plans


def make_plan(samples: Samples, options: dict[str, Any], shard_size: int, seed: int) -> Plan:
    """Scattered samples, cut into shards of about `shard_size` bytes of input; smaller ones where
    that many would leave processes without work. Does not depend on the number of processes."""
    places = array("Q")
    for i in range(len(samples)):
        places.append(place(samples.key(i), seed))
    order = np.argsort(np.frombuffer(places, np.uint64), kind="stable")
    limit = min(shard_size, max(MIN_SHARD, sum(samples.sizes) // SHARDS_AT_LEAST))
    bounds, filled = array("Q", [0]), 0
    for at, j in enumerate(order):
        if filled >= limit:
            bounds.append(at)
            filled = 0
        filled += samples.sizes[j]
    bounds.append(len(order))
    return Plan(options, samples, order, bounds, _apart(samples, places, order))


def place(key: str, seed: int) -> int:
    """Where a sample stands in an order that looks random and depends on the seed and the keys
    alone, so that a corpus sorted by speaker or class gives mixed shards. A hash, for no
    generator's sequence is promised to stay."""
    text = f"{seed}/{key}".encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def _apart(samples: Samples, places: array[int], order: Any) -> dict[int, str]:
    """Keys that several samples share (a.b.wav and a_b.wav; a.wav and a.flac) get a hash. Such
    samples are neighbours in the order, so no table of all keys is needed."""
    keys: dict[int, str] = {}
    used: set[str] = set()
    sorted_places = np.frombuffer(places, np.uint64)[order]
    for at in np.flatnonzero(sorted_places[1:] == sorted_places[:-1]):
        for j in map(int, order[at : at + 2]):
            if j in keys:  # the middle one of three
                continue
            sample = samples[j]
            names = "\0".join(map(str, sample.inputs))
            key = make_key(sample.key, apart=names)
            if key in used:  # the same input twice
                key = make_key(sample.key, apart=f"{names}\0{j}")
            used.add(key)
            keys[j] = key
    return keys


# ---------------------------------------------------------------------------------- what is chosen


def split_of(value: str, shares: Mapping[str, float]) -> str:
    """The split that a key (or a speaker ...) belongs to: by its hash alone, so it stays there when
    the corpus grows."""
    digest = hashlib.blake2b(value.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    point, passed = int.from_bytes(digest, "little") / 2**64, 0.0
    for name, share in shares.items():
        passed += share
        if point < passed:
            return name
    return name  # the shares sum to 1 but for rounding


def _split_value(sample: Sample, column: str) -> str:
    if not column:
        return sample.key
    if column not in sample.columns:
        raise UserError(
            f"--split-by {column}: {sample.inputs[0]} has no such column"
            f"{suggestion(column, sample.columns)}"
        )
    return str(sample.columns[column])


def _chosen(samples: Iterable[Sample], choice: Choice) -> Iterator[Sample]:
    if not choice.only and not choice.leave_out:
        yield from samples
        return
    only = _read_list(choice.only) if choice.only else None
    leave_out: Collection[str] = _read_list(choice.leave_out) if choice.leave_out else ()
    missing = set(only or ()) | set(leave_out)
    for sample in samples:
        names = {sample.key, *(item.path for item in sample.inputs)}
        missing -= names
        if (only is None or not names.isdisjoint(only)) and names.isdisjoint(leave_out):
            yield sample
    if missing:
        files = " and ".join(str(file) for file in (choice.only, choice.leave_out) if file)
        raise UserError(
            f"{files}: {len(missing)} of the names in it are neither key nor path of an input, "
            f"the first {min(missing)!r}"
        )


def _read_list(path: Path) -> frozenset[str]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a list of keys or paths ({error})") from None
    return frozenset(line.strip() for line in lines if line.strip())


def _digest_of(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
