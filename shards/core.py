"""What every converter shares: plan -> shard jobs over processes -> a finished set.

    samples (of a corpus family) -> plan_shards -> one job a shard -> reports -> index.json

The plan is a pure function of the inputs and the options, and the content of a shard of its row of
the plan alone. So any number of processes gives the same bytes, and a conversion that was killed
goes on with the shards that lack a report. While it is under way OUT holds

    plan.json               hash and options of the plan, and what index.json will say of the set
    NAME-000000.tar, .idx   finished shards
    NAME-000000.json        report of a finished shard: its entry and the inputs it left out

and at its end index.json and quarantine.jsonl take the place of plan.json and the reports. An array
job gives every n-th shard to each of n tasks, which meet in OUT alone; `merge` is their end.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from tqdm import tqdm

from d2v_ds.errors import UserError
from d2v_ds.shard_format import INDEX_FILE, PLAN_FILE, ShardEntry, ShardSet, open_set, set_json
from shards.workers import run_jobs
from shards.writer import ShardWriter, remove_stale, write_atomically

CONVERTER = 1  # raised when the same inputs and options begin to give other bytes
QUARANTINE_FILE = "quarantine.jsonl"
MIN_SHARD = 4_000_000  # bytes; smaller corpora are not cut up for the sake of parallelism
SHARDS_AT_LEAST = 16

Rejected = tuple[str, str]  # path of an input, reason


@dataclass(frozen=True)
class Sample:
    """What one sample of a set is made from."""

    key: str
    paths: tuple[str, ...]  # inputs, relative to the corpus
    columns: dict[str, str]  # what the corpus says about it
    size: int  # of the inputs, bytes


@dataclass(frozen=True)
class Converted:
    members: tuple[bytes, ...]  # payloads in the order of the converter's fields; empty: left out
    length: int
    rejected: tuple[Rejected, ...] = ()


class Converter(Protocol):
    """Of one corpus family; it travels to the worker processes, so it holds settings only."""

    modality: ClassVar[str]
    unit: ClassVar[str]
    fields: ClassVar[tuple[str, ...]]  # sorted

    @property
    def sample_rate(self) -> int: ...

    def convert(self, sample: Sample) -> Converted:
        """Inputs that cannot be used are in `rejected`; it never raises for them."""


@dataclass(frozen=True)
class Plan:
    """Which sample goes where."""

    options: dict[str, Any]  # that decide on the content, by their name on the command line
    shards: tuple[tuple[Sample, ...], ...]

    @property
    def inputs(self) -> int:
        return sum(len(sample.paths) for shard in self.shards for sample in shard)

    def hash(self) -> str:
        digest = hashlib.sha256(json.dumps([CONVERTER, self.options]).encode())
        for shard in self.shards:
            digest.update(b"\0")
            for s in shard:
                digest.update(json.dumps([s.key, s.paths, s.columns, s.size]).encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class Report:
    """Of a finished shard."""

    entry: ShardEntry
    rejected: tuple[Rejected, ...]


def scattered(items: Iterable[Sample], seed: int) -> list[Sample]:
    """In an order that looks random and depends on the seed and the keys alone, so that a corpus
    sorted by speaker or class gives mixed shards. A hash, for no generator's sequence is promised
    to stay."""

    def place(sample: Sample) -> tuple[bytes, str]:
        digest = hashlib.blake2b(f"{seed}/{sample.key}".encode(), digest_size=8)
        return digest.digest(), sample.key

    return sorted(items, key=place)


def plan_shards(
    samples: Iterable[Sample], shard_size: int, seed: int
) -> tuple[tuple[Sample, ...], ...]:
    """Scattered samples, cut into shards of about `shard_size` bytes of input; smaller ones where
    that many would leave processes without work. Does not depend on the number of processes."""
    order = scattered(samples, seed)
    limit = min(shard_size, max(MIN_SHARD, sum(s.size for s in order) // SHARDS_AT_LEAST))
    shards: list[list[Sample]] = []
    filled = limit
    for sample in order:
        if filled >= limit:
            shards.append([])
            filled = 0
        shards[-1].append(sample)
        filled += sample.size
    return tuple(tuple(shard) for shard in shards)


# --------------------------------------------------------------------------------------- converting


def convert(
    plan: Plan,
    converter: Converter,
    out: Path,
    jobs: int,
    max_bad: float,
    task: tuple[int, int] = (0, 1),
) -> ShardSet | None:
    """Runs the plan, or what is left of it, into the folder `out`; returns the finished set.

    max_bad: the share of the inputs that may be left out. task (i, n): of the plan every n-th shard
    from the i-th on; the set is then finished by `merge`, and the result is None. Raises UserError
    when max_bad is passed, and when `out` holds anything but this conversion.
    """
    finished = _enter(out, plan, converter)
    if finished:
        _clean(out)
        return finished
    first, every = task
    own = range(first, len(plan.shards), every)
    reports: dict[int, Report] = {}
    for i in own:
        report = _read_report(out, _name(converter.modality, i))
        if report:
            reports[i] = report
    pending = [
        (converter, out, _name(converter.modality, i), plan.shards[i])
        for i in own
        if i not in reports
    ]
    inputs = sum(len(sample.paths) for i in own for sample in plan.shards[i])
    bad = sum(len(report.rejected) for report in reports.values())
    bar = tqdm(total=inputs, unit=" files", disable=None, desc=str(out))
    bar.update(sum(len(s.paths) for i in reports for s in plan.shards[i]))
    with bar:
        for report in run_jobs(convert_shard, pending, jobs):
            i = int(report.entry.name.rpartition("-")[2])
            reports[i] = report
            bar.update(sum(len(s.paths) for s in plan.shards[i]))
            bad += len(report.rejected)
            if bad > max_bad * inputs:
                break
    ordered = [reports[i] for i in sorted(reports)]
    if every == 1:
        return _finish(out, _about(plan, converter), ordered, inputs, max_bad)
    if bad > max_bad * inputs:
        raise UserError(_too_many_bad(ordered, inputs, max_bad))
    return None


def merge(out: Path, max_bad: float) -> ShardSet:
    """Finishes the conversion in `out` when its tasks have made every shard; returns the set.

    Raises UserError when shards are missing, when max_bad is passed, and when `out` holds no
    conversion.
    """
    try:
        about = json.loads((out / PLAN_FILE).read_bytes())
    except FileNotFoundError:
        if (out / INDEX_FILE).exists():
            return open_set(out)
        raise UserError(f"{out}: holds no conversion to merge; give the OUT of its tasks") from None
    names = [_name(about["modality"], i) for i in range(about["shards"])]
    found = [(name, _read_report(out, name)) for name in names]
    missing = [name for name, report in found if not report]
    if missing:
        raise UserError(
            f"{out}: {len(missing)} of {len(names)} shards are missing, the first {missing[0]}; "
            "run the tasks again, each goes on where it was"
        )
    return _finish(out, about, [report for _, report in found if report], about["inputs"], max_bad)


def convert_shard(
    job: tuple[Converter, Path, str, tuple[Sample, ...]],
) -> Report:
    """Writes one shard, then its report."""
    converter, out, name, samples = job
    rejected: list[Rejected] = []
    with ShardWriter(out, name, converter.fields) as writer:
        for sample in samples:
            converted = converter.convert(sample)
            rejected.extend(converted.rejected)
            if converted.members:
                writer.add(sample.key, converted.members, converted.length)
        entry = writer.finish() if writer.samples else ShardEntry(name, 0, 0, 0, "")
    report = Report(entry, tuple(rejected))
    write_atomically(_report_file(out, name), json.dumps(dataclasses.asdict(report)).encode())
    return report


def _name(modality: str, i: int) -> str:
    return f"{modality}-{i:06d}"


def _report_file(out: Path, name: str) -> Path:
    return out / f"{name}.json"


def _read_report(out: Path, name: str) -> Report | None:
    """None where the shard is not finished."""
    try:
        raw = json.loads(_report_file(out, name).read_bytes())
        report = Report(ShardEntry(**raw["entry"]), tuple((p, r) for p, r in raw["rejected"]))
        entry = report.entry
        whole = not entry.samples or (
            (out / f"{name}.tar").stat().st_size == entry.bytes and (out / f"{name}.idx").exists()
        )
    except FileNotFoundError:
        return None
    return report if whole else None


def _about(plan: Plan, converter: Converter) -> dict[str, Any]:
    """plan.json."""
    return {
        "plan": plan.hash(),
        "options": plan.options,
        "shards": len(plan.shards),
        "inputs": plan.inputs,
        "modality": converter.modality,
        "unit": converter.unit,
        "sample_rate": converter.sample_rate,
        "fields": list(converter.fields),
    }


def _enter(out: Path, plan: Plan, converter: Converter) -> ShardSet | None:
    """Makes `out` ready for this plan; the set when it is finished already. Raises UserError."""
    about = _about(plan, converter)
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; name a folder for the shards")
    out.mkdir(parents=True, exist_ok=True)
    for file in (INDEX_FILE, PLAN_FILE):
        if not (out / file).exists():
            continue
        try:
            held = json.loads((out / file).read_bytes())
        except ValueError:
            held = {}
        if held.get("plan") != about["plan"]:
            raise UserError(_other_plan(out, file, held.get("options", {}), plan.options))
        if file == INDEX_FILE:
            return open_set(out)
        remove_stale(out)
        return None
    foreign = sorted(name for name in os.listdir(out) if not name.endswith(".tmp"))
    if PLAN_FILE in foreign:  # another task was quicker
        return _enter(out, plan, converter)
    if foreign:
        raise UserError(
            f"{out}: is not empty (it has {foreign[0]}) and holds no conversion; "
            "name a new or empty folder"
        )
    write_atomically(out / PLAN_FILE, json.dumps(about).encode())
    return None


def _other_plan(out: Path, file: str, held: dict[str, Any], wanted: dict[str, Any]) -> str:
    what = "a finished shard set" if file == INDEX_FILE else "an unfinished conversion"
    changed = [
        f"--{key} was {held.get(key)}, is {wanted.get(key)}"
        for key in sorted({*held, *wanted})
        if held.get(key) != wanted.get(key)
    ]
    return (
        f"{out}: holds {what} of other inputs or options "
        f"({'; '.join(changed) or 'the inputs differ'}); name another folder or delete this one"
    )


def _too_many_bad(reports: Sequence[Report], inputs: int, max_bad: float, where: str = "") -> str:
    rejected = [item for report in reports for item in report.rejected]
    path, reason = rejected[0]
    return (
        f"{len(rejected)} of {inputs} inputs cannot be used, more than --max-bad {max_bad:.3%}; "
        f"the first: {path}: {reason}{where}. "
        "Repair or remove them, or raise --max-bad"
    )


def _write_quarantine(out: Path, reports: Sequence[Report]) -> None:
    lines = [
        json.dumps({"path": path, "reason": reason}) + "\n"
        for report in reports
        for path, reason in report.rejected
    ]
    write_atomically(out / QUARANTINE_FILE, "".join(lines).encode())


def _finish(
    out: Path, about: dict[str, Any], reports: Sequence[Report], inputs: int, max_bad: float
) -> ShardSet:
    """Writes index.json; about: what plan.json says."""
    _write_quarantine(out, reports)
    quarantined = sum(len(report.rejected) for report in reports)
    if quarantined > max_bad * inputs:
        where = f"; all are in {out / QUARANTINE_FILE}"
        raise UserError(_too_many_bad(reports, inputs, max_bad, where))
    result = ShardSet(
        root=out,
        modality=about["modality"],
        unit=about["unit"],
        sample_rate=about["sample_rate"],
        fields=tuple(about["fields"]),
        shards=tuple(report.entry for report in reports if report.entry.samples),
    )
    if not result.shards:
        raise UserError(f"{out}: not one input can be used; see {out / QUARANTINE_FILE}")
    origin = {
        "converter": CONVERTER,
        "options": about["options"],
        "plan": about["plan"],
        "inputs": inputs,
        "quarantined": quarantined,
    }
    write_atomically(out / INDEX_FILE, set_json(result, **origin).encode())
    _clean(out)
    return result


def _clean(out: Path) -> None:
    """Removes what only an unfinished conversion needs."""
    (out / PLAN_FILE).unlink(missing_ok=True)
    remove_stale(out, all_of_them=True)
    for report in out.glob("*-" + "[0-9]" * 6 + ".json"):
        report.unlink(missing_ok=True)
