"""An index for third-party WebDataset tars, from headers only: nothing is copied or decoded.

    NAME.tar ... -> members (tar_scan.py), lengths (headers.py) -> NAME.idx ..., index.json

The result is a shard set as described in shard_format.py, next to the tars or in a separate
folder. Standard library only.
"""

from __future__ import annotations

import json
import os
from array import array
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from d2v_ds.data.checks import ALTERED, Finding, Unusable, kind_of
from d2v_ds.data.checksum import checksum_of
from d2v_ds.data.headers import Length, SampleFormat, payload
from d2v_ds.data.set_file import SHARD_NAME_BYTES, plain_name
from d2v_ds.data.shard_format import INDEX_FILE, ShardEntry, ShardSet, set_json
from d2v_ds.data.shard_index import index_bytes, index_digest
from d2v_ds.data.tar_scan import (
    UNUSED,
    DamagedTar,
    Member,
    about_unused,
    key_of,
    members,
    samples,
    without_dots,
)
from d2v_ds.errors import UserError
from d2v_ds.files import write_atomically

MAX_BAD = 0.01  # fraction of samples without a usable length


@dataclass(frozen=True)
class IndexedTar:
    """The index of one tar."""

    entry: ShardEntry
    idx: bytes  # content of NAME.idx
    sample_rate: int
    left_out: tuple[Finding, ...]  # by key
    notes: tuple[Finding, ...] = ()  # members that are not used


def index_set(
    tars: Sequence[Path],
    out: Path,
    formats: Sequence[SampleFormat],
    checksum: str = "none",
    run: Callable[..., Iterable[IndexedTar]] = map,
) -> ShardSet:
    """Writes an .idx for each tar, then index.json, into `out`; the tars stay where they are.

    formats: the format of the samples, or candidates, one of which matches the first tar's members.
    checksum: "none", or a kind that checksum.py knows, for which every payload is read. run: `map`,
    or a parallel one, in any order. Raises UserError if there are no tars, if they are in several
    folders, if one is damaged, if samples have different sample rates or too many have no usable
    length, and if `out` is a shard set already. A set that is refused leaves only the list of the
    samples that cannot be used.
    """
    if not tars:
        raise UserError(f"{out}: no tars to index")
    folders = {tar.parent.resolve() for tar in tars}
    if len(folders) > 1:
        raise UserError("the tars of one set must be in one folder; index each folder separately")
    if (out / INDEX_FILE).exists():
        raise UserError(f"{out}: is already a shard set; delete its {INDEX_FILE} to index it again")
    for tar in tars:
        try:
            plain_name(tar.stem, SHARD_NAME_BYTES)
        except ValueError as error:
            raise UserError(f"{tar}: {error}; rename the tar") from None
    form = formats[0] if len(formats) == 1 else guess_format(tars[0], formats)
    is_new, written = not out.exists(), list[Path]()
    out.mkdir(parents=True, exist_ok=True)
    try:
        (folder,) = folders
        elsewhere = None if folder == out.resolve() else folder
        indexed = run(index_tar, [(tar, form, checksum) for tar in tars])
        return _written(out, form, indexed, elsewhere, written)
    except BaseException:
        for file in written:
            file.unlink(missing_ok=True)
        if is_new:
            with suppress(OSError):  # it holds the list of samples that cannot be used
                out.rmdir()
        raise


def _written(
    out: Path,
    form: SampleFormat,
    found: Iterable[IndexedTar],
    elsewhere: Path | None,
    written: list[Path],
) -> ShardSet:
    """elsewhere: the folder of the tars if it is not `out`. written: every .idx is appended."""
    entries, left_out, notes, rates = [], list[Finding](), list[Finding](), dict[int, str]()
    for indexed in found:
        entry = indexed.entry
        if entry.samples:
            rates.setdefault(indexed.sample_rate, entry.name)
        unusable = map(_of_member, indexed.left_out)
        for findings, those in ((left_out, unusable), (notes, indexed.notes)):
            findings += [one._replace(name=f"{entry.name}.tar, {one.name}") for one in those]
        entries.append(entry)
        written.append(out / f"{entry.name}.idx")
        write_atomically(written[-1], indexed.idx)
    if len(rates) > 1:
        named = ", ".join(f"{rate} Hz in {name}.tar" for rate, name in sorted(rates.items()))
        raise UserError(f"{out}: a set has one sample rate (found {named}); {_convert(form)}")
    entries.sort(key=lambda entry: entry.name)
    inputs = sum(entry.samples for entry in entries) + len(left_out)
    _write_list(out / "quarantine.jsonl", left_out)
    if len(left_out) > MAX_BAD * inputs:
        name, reason, _ = min(left_out)
        raise UserError(
            f"{out}: {len(left_out)} of {inputs} samples cannot be used; the first: {name}: "
            f"{reason}; all are listed in {out / 'quarantine.jsonl'}. Repair or remove them; if "
            f"more than {MAX_BAD:.0%} cannot be used, convert the tars: {_convert(form)} "
            "with --max-bad"
        )
    _write_list(out / "notes.jsonl", notes)
    result = ShardSet(
        out,
        form.modality,
        form.length_unit,
        next(iter(rates), 0),
        form.fields,
        tuple(entry for entry in entries if entry.samples),
        elsewhere,
    )
    about: dict[str, Any] = {
        "indexed": True,
        "inputs": inputs,
        "quarantined": len(left_out),
        "options": {},
        "left_out": _counts(left_out),
        "passed_over": _counts(note for note in notes if note.kind not in ALTERED),
        "altered": _counts(note for note in notes if note.kind in ALTERED),
    }
    write_atomically(out / INDEX_FILE, set_json(result, **about))
    return result


def _write_list(file: Path, findings: Iterable[Finding]) -> None:
    lines = (
        json.dumps({"path": found.name, "reason": found.reason, "kind": found.kind}) + "\n"
        for found in sorted(findings)
    )
    write_atomically(file, "".join(lines))


def _counts(findings: Iterable[Finding]) -> dict[str, int]:
    """{kind: number}, the most frequent first."""
    return dict(Counter(found.kind for found in findings).most_common())


def guess_format(tar: Path, formats: Sequence[SampleFormat]) -> SampleFormat:
    """The format of the first sample's members. Raises UserError."""
    with tar.open("rb") as file:
        try:
            _, group = next(samples(members(file)), ("", {}))
        except DamagedTar as error:
            raise UserError(f"{tar}: {error}; copy it again") from None
    found = [form for form in formats if group.keys() & form.readers.keys()]
    if len(found) != 1:
        known = "; ".join(f"{f.modality}: {', '.join(f.readers)}" for f in formats if f.readers)
        converters = "|".join(f.converter for f in formats if f.converter)
        raise UserError(
            f"{tar}: its first sample has {', '.join(group) or 'no members'}, which does not "
            f"identify a modality ({known}); name one with --modality, or convert the tars with "
            f"`d2v-shards {converters} --layout webdataset`"
        )
    return found[0]


def index_tar(job: tuple[Path, SampleFormat, str], one_rate: bool = True) -> IndexedTar:
    """(tar, format, kind of checksum) -> its index. one_rate: samples whose rate differs from
    that of the first are left out. Raises UserError."""
    tar, form, kind = job
    names, known, checksum = form.fields, set(form.fields), checksum_of(kind)
    keys: list[str] = []
    offsets, sizes, checksums, lengths = array("q"), array("I"), array("I"), array("I")
    left_out, notes = list[Finding](), list[Finding]()
    rate = 0
    with tar.open("rb") as file:
        try:
            unused: list[Member] = []
            for key, group in samples(members(file), unused):
                try:
                    length = _length(file, group, form)
                    rate = rate or length.rate
                    if one_rate and length.rate != rate:
                        reason = f"has {length.rate} Hz, but earlier samples have {rate} Hz"
                        raise Unusable("rate", reason)
                except ValueError as error:
                    left_out.append(Finding(key, str(error), kind_of(error)))
                    continue
                keys.append(key)
                lengths.append(length.length)
                if not group.keys() <= known or any(m.problem for m in group.values()):
                    notes += _notes(key, group, known)
                for name in names:
                    member = group.get(name)
                    offsets.append(member.offset if member else 0)
                    sizes.append(member.size if member else 0)
                    data = payload(file, member) if checksum and member else b""
                    checksums.append(checksum(data) if checksum and member else 0)
        except DamagedTar as error:
            raise UserError(
                f"{tar}: {error}; copy it again, or convert the undamaged part: {_convert(form)}"
            ) from None
        notes += map(about_unused, unused)
        size = file.seek(0, os.SEEK_END)
    idx = index_bytes(names, size, keys, offsets, sizes, checksums, lengths, kind)
    digest = index_digest(idx)  # since the tar was not read
    entry = ShardEntry(tar.stem, len(keys), size, sum(lengths), digest)
    return IndexedTar(entry, idx, rate, tuple(left_out), tuple(notes))


def _of_member(found: Finding) -> Finding:
    """The finding about a sample under the name that a conversion of the tar gives it: KEY.flac if
    the reason is that of a member, which readers put before it."""
    member, colon, reason = found.reason.partition(": ")
    if colon and member.startswith(".") and " " not in member:
        return Finding(found.name + member, reason, found.kind)
    return found


def _notes(key: str, group: dict[str, Member], known: Collection[str]) -> Iterator[Finding]:
    """The members of a sample that the index lacks."""
    for name, member in group.items():
        if name not in known:
            yield Finding(f"{key}.{name}", UNUSED, "unused")
        elif member.problem:
            reason = f"{member.problem.reason}; the sample is kept without it"
            yield Finding(f"{key}.{name}", reason, "no metadata")


def _convert(form: SampleFormat) -> str:
    return f"`d2v-shards {form.converter or 'FAMILY'} SOURCE OUT --layout webdataset`"


def _length(file: BinaryIO, group: dict[str, Member], form: SampleFormat) -> Length:
    """Raises ValueError."""
    for name, read in form.readers.items():
        if name in group:
            if problem := group[name].problem:
                raise Unusable(problem.kind, f".{name}: {problem.reason}")
            length = read(file, group[name])
            if not 0 < length.length < 1 << 32 or max(m.size for m in group.values()) >= 1 << 32:
                raise Unusable(
                    "size",
                    f".{name}: {length.length} {form.length_unit}, or its size, is out of range",
                )
            return length
    cut = key_of(next(iter(group.values())).name)
    assert cut
    raise Unusable(
        "row",
        f"has only {', '.join(group)}, none of {', '.join(form.readers)}"
        f"{without_dots(cut[1], group, form.readers)}",
    )
