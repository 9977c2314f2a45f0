"""Runs a conversion plan: one job per shard, over processes -> a finished set.

    ConversionPlan (shards/plan.py) -> jobs -> reports -> index.json

The plan is a pure function of the inputs and the options, and a shard depends only on its part of
the plan. Any number of processes writes the same bytes, and a killed conversion resumes with the
shards that have no report. Until the conversion has finished, OUT contains

    plan.json               hash and options of the plan, and the entries of index.json
    NAME-000000.tar, .idx   finished shards
    NAME-000000.json        report of a finished shard: its entry and findings

At the end, index.json, quarantine.jsonl (inputs left out) and notes.jsonl (files passed over,
inputs altered) replace plan.json and the reports. In an array job of n tasks, each task converts
every n-th shard; the tasks share only OUT, and `merge` finishes the set.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from d2v_ds.data.checks import Finding
from d2v_ds.data.shard_format import INDEX_FILE, PLAN_FILE, ShardEntry, ShardSet, open_set, set_json
from d2v_ds.errors import UserError
from d2v_ds.files import remove_stale, write_atomically
from shards.family import Converter, PackedMember
from shards.findings import (
    QUARANTINE_FILE,
    counted,
    counts,
    first_reasons,
    left_out,
    normalised,
    unusable,
    write_lists,
)
from shards.plan import CONVERTER, ConversionPlan, Samples
from shards.reading import inputs_of, marked
from shards.resume import ShardReport, read_held, read_plan, read_report, report_file
from shards.workers import WorkerDied, WorkerPool
from shards.writer import ShardWriter

# --------------------------------------------------------------------------------------- converting


def convert(
    plan: ConversionPlan,
    converter: Converter,
    out: Path,
    pool: WorkerPool,
    max_bad: float,
    task: tuple[int, int] = (0, 1),
) -> ShardSet | None:
    """Runs the plan in the folder `out`, or resumes it; returns the finished set.

    max_bad: share of the inputs that may be left out. task (i, n): convert only every n-th shard,
    starting with shard i, and return None; `merge` finishes the set. Raises UserError if max_bad is
    exceeded, or if `out` contains anything other than this conversion.
    """
    about = _about(plan, converter)
    finished = _enter(out, about)
    if finished:
        _clean(out)
        return finished
    for name, source in converter.files.items():
        write_atomically(out / name, source.read_bytes())
    first, every = task
    own = range(first, plan.shards, every)
    reports: dict[int, ShardReport] = {}
    for i in own:
        report = read_report(out, _name(converter.modality, i))
        if report:
            reports[i] = report
    pending = [i for i in own if i not in reports]
    work = ((converter, out, _name(converter.modality, i), plan.shard(i)) for i in pending)
    # Of all tasks, because a task alone may have a larger share of bad inputs than --max-bad.
    inputs = about["inputs"] + sum(report.found for report in reports.values())
    bad = sum(report.bad for report in reports.values()) + len(unusable(plan.findings))
    total = sum(plan.inputs_of(i) for i in own)
    bar = tqdm(total=total, unit=" files", disable=None, desc=str(out))
    bar.update(sum(plan.inputs_of(i) for i in reports))
    with bar:
        try:
            for report in pool.run(convert_shard, work, len(pending)):
                i = int(report.entry.name.rpartition("-")[2])
                reports[i] = report
                bar.update(plan.inputs_of(i))
                bad += report.bad
                inputs += report.found
                if converter.knows_inputs and bad > max_bad * inputs:
                    break
        except WorkerDied as error:
            raise WorkerDied(error.processes, inputs_of(out, error.processes)) from None
    ordered = [reports[i] for i in sorted(reports)]
    if every == 1:
        return _finish(out, about, ordered, max_bad)
    if converter.knows_inputs and bad > max_bad * inputs:
        raise UserError(_too_many_bad(_findings(about, ordered), inputs, max_bad))
    return None


def merge(out: Path, max_bad: float) -> ShardSet:
    """Finishes the conversion in `out` after its tasks have written every shard; returns the set.

    Raises UserError if shards are missing, if max_bad is exceeded, or if `out` contains no
    conversion.
    """
    try:
        about = read_plan(out)
    except FileNotFoundError:
        if (out / INDEX_FILE).exists():
            return open_set(out)
        raise UserError(
            f"{out}: contains no conversion to merge; give the OUT of its tasks"
        ) from None
    names = [_name(about["modality"], i) for i in range(about["shards"])]
    found = [(name, read_report(out, name)) for name in names]
    missing = [name for name, report in found if not report]
    if missing:
        raise UserError(
            f"{out}: {len(missing)} of {len(names)} shards are missing, the first {missing[0]}; "
            "run the unfinished tasks again, they resume"
        )
    return _finish(out, about, [report for _, report in found if report], max_bad)


def check_splits(out: Path, folders: Sequence[Path]) -> None:
    """Raises UserError if a set of --split is not among the folders of those in `out`."""
    for folder in folders:
        file = PLAN_FILE if (folder / PLAN_FILE).exists() else INDEX_FILE
        split = read_held(folder, file).get("options", {}).get("split", {})
        for name in split.get(folder.name, {}):
            if out / name not in folders:
                raise UserError(
                    f"{out / name}: no task has begun this split; run the unfinished tasks again, "
                    "they resume"
                )


def convert_shard(job: tuple[Converter, Path, str, Samples]) -> ShardReport:
    """Writes one shard, then its report."""
    converter, out, name, samples = job
    findings: list[Finding] = []
    found = 0
    with ShardWriter(out, name, converter.fields) as writer:
        for made in converter.convert(marked(samples, out, name)):
            findings.extend(normalised(made.findings))
            found += made.found
            if isinstance(made, PackedMember):
                writer.add_packed(made.name, made.payload, made.rows)
            elif made.members:
                writer.add(made.key, made.members, made.length)
        entry = writer.finish() if writer.samples else ShardEntry(name, 0, 0, 0, "")
    report = ShardReport(entry, tuple(findings), found)
    write_atomically(report_file(out, name), json.dumps(dataclasses.asdict(report)).encode())
    return report


def describe(shards: ShardSet) -> str:
    """One line about a finished set."""
    if shards.sample_rate:
        length = f"{shards.length / shards.sample_rate / 3600:.3f} hours"
    else:
        length = f"{shards.length:,} {shards.length_unit}"
    number = len(shards.shards)
    return (
        f"{shards.root}: {shards.samples} samples, {length}, "
        f"{number} shard{'' if number == 1 else 's'}"
    )


def _name(modality: str, i: int) -> str:
    return f"{modality}-{i:06d}"


def _about(plan: ConversionPlan, converter: Converter) -> dict[str, Any]:
    """The content of plan.json."""
    of_corpus = converter.about
    if plan.remark:
        of_corpus = {**of_corpus, "remarks": [*of_corpus.get("remarks", ()), plan.remark]}
    return {
        "plan": plan.hash(),
        "converter": CONVERTER,
        "options": plan.options,
        "shards": plan.shards,
        "inputs": plan.inputs + len(left_out(plan.findings)),
        "findings": plan.findings,
        "modality": converter.modality,
        "unit": converter.length_unit,
        "sample_rate": converter.sample_rate,
        "fields": list(converter.fields),
        "about": of_corpus,
    }


def _enter(out: Path, about: dict[str, Any]) -> ShardSet | None:
    """Prepares `out` for this plan; returns the set if it is already finished. Raises UserError."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; OUT must be a folder")
    out.mkdir(parents=True, exist_ok=True)
    for file in (INDEX_FILE, PLAN_FILE):
        if not (out / file).exists():
            continue
        held = read_held(out, file)
        if held.get("plan") != about["plan"]:
            raise UserError(_other_plan(out, file, held, about["options"]))
        if file == INDEX_FILE:
            return open_set(out)
        remove_stale(out)
        return None
    others = sorted(name for name in os.listdir(out) if not name.endswith(".tmp"))
    if PLAN_FILE in others:  # another task has created it
        return _enter(out, about)
    if others:
        raise UserError(
            f"{out}: is not empty (it contains {others[0]}) and is not a conversion; use a new or "
            "empty folder"
        )
    write_atomically(out / PLAN_FILE, json.dumps(about).encode())
    return None


def _other_plan(out: Path, file: str, held_about: dict[str, Any], wanted: dict[str, Any]) -> str:
    what = "a finished shard set" if file == INDEX_FILE else "an unfinished conversion"
    version, held = held_about.get("converter", 0), held_about.get("options", {})
    changed = [
        f"--{key} was {held.get(key)}, now {wanted.get(key)}"
        for key in sorted({*held, *wanted})
        if held.get(key) != wanted.get(key)
    ]
    if version != CONVERTER and not changed:
        made = "by another version of d2v-shards"
        if not version and file == INDEX_FILE:
            made = "by `d2v-shards index` or another program"
        return f"{out}: contains {what} that was made {made}; use another folder or delete this one"
    return (
        f"{out}: contains {what} with other inputs or options "
        f"({'; '.join(changed) or 'the inputs differ'}); use another folder or delete this one"
    )


def _too_many_bad(findings: Sequence[Finding], inputs: int, max_bad: float, where: str = "") -> str:
    bad = unusable(findings)
    return (
        f"{len(bad)} of {counted(inputs)} cannot be used, more than --max-bad {max_bad:.3%} "
        f"allows: {first_reasons(bad)}{where}. Repair or remove them, or increase --max-bad"
    )


def _findings(about: dict[str, Any], reports: Sequence[ShardReport]) -> list[Finding]:
    """Those of the plan, then those of the shards."""
    of_plan = [Finding(*found) for found in about["findings"]]
    return of_plan + [found for report in reports for found in report.findings]


def _finish(
    out: Path, about: dict[str, Any], reports: Sequence[ShardReport], max_bad: float
) -> ShardSet:
    """Writes index.json and the lists of findings. about: the content of plan.json."""
    findings = _findings(about, reports)
    inputs = about["inputs"] + sum(report.found for report in reports)
    write_lists(out, findings)
    if len(unusable(findings)) > max_bad * inputs:
        where = f" (all are listed in {out / QUARANTINE_FILE})"
        raise UserError(_too_many_bad(findings, inputs, max_bad, where))
    result = ShardSet(
        root=out,
        modality=about["modality"],
        length_unit=about["unit"],
        sample_rate=about["sample_rate"],
        fields=tuple(about["fields"]),
        shards=tuple(report.entry for report in reports if report.entry.samples),
    )
    if not inputs:  # the split of a corpus whose documents are assigned while they are read
        raise UserError(f"--split: no document falls into {out.name!r}; increase its share")
    if not result.shards:
        raise UserError(
            f"{out}: none of the inputs can be used: {first_reasons(left_out(findings))}. All are "
            f"listed in {out / QUARANTINE_FILE}"
        )
    origin = {
        **about["about"],
        "converter": CONVERTER,
        "options": about["options"],
        "plan": about["plan"],
        "inputs": inputs,
        "quarantined": len(left_out(findings)),
        **counts(findings),
    }
    write_atomically(out / INDEX_FILE, set_json(result, **origin).encode())
    _clean(out)
    return result


def _clean(out: Path) -> None:
    """Removes the files that only an unfinished conversion needs."""
    (out / PLAN_FILE).unlink(missing_ok=True)
    remove_stale(out, all_hosts=True)
    for report in out.glob("*-" + "[0-9]" * 6 + ".json"):
        report.unlink(missing_ok=True)
