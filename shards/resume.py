"""What a conversion that resumes reads back from OUT: plan.json, and the reports of its shards.

    plan.json --read_plan--> entries; NAME-000000.json --read_report--> ShardReport

A conversion may have been killed at any moment, and files may have been damaged since. A report
that cannot be used means that its shard is converted again.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d2v_ds.data.checks import KINDS, Finding
from d2v_ds.data.set_file import (
    SHA256,
    TOTALS,
    OtherFormat,
    parse_set,
    plain_name,
    unique_fields,
    whole,
)
from d2v_ds.data.shard_format import INDEX_FILE, PLAN_FILE, ShardEntry
from d2v_ds.errors import UserError
from shards.findings import unusable

log = logging.getLogger("d2v_ds")

MOST_SHARDS = 1_000_000


@dataclass(frozen=True)
class ShardReport:
    """Report of a finished shard."""

    entry: ShardEntry
    findings: tuple[Finding, ...]
    found: int = 0

    @property
    def bad(self) -> int:
        """The number of inputs that --max-bad limits."""
        return len(unusable(self.findings))


def read_held(out: Path, file: str) -> dict[str, Any]:
    """The entries of the index.json or plan.json in a folder, as far as they say which conversion
    it contains; none of another version's index.json. Raises UserError."""
    content = (out / file).read_bytes()
    with _continued(out / file), contextlib.suppress(OtherFormat):
        if file == INDEX_FILE:
            return parse_set(content)
        raw = _object(content)
        _options(raw)
        return raw
    return {}


def read_plan(out: Path) -> dict[str, Any]:
    """The entries of plan.json. Raises FileNotFoundError, UserError."""
    content = (out / PLAN_FILE).read_bytes()
    with _continued(out / PLAN_FILE):
        return parse_plan(content)


@contextlib.contextmanager
def _continued(file: Path) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise UserError(
            f"{file}: is damaged ({error}), so the conversion there cannot be continued; use "
            "another folder or delete this one"
        ) from None


def parse_plan(content: bytes) -> dict[str, Any]:
    """The entries of a plan.json. Raises ValueError, whose message is the fault."""
    raw = _object(content)
    for key in ("plan", "unit"):
        if not isinstance(raw.get(key), str):
            raise ValueError(f"its {key} is not a text")
    plain_name(raw.get("modality"))  # it is a part of the names of the shards
    whole(raw.get("converter"), "its converter")
    whole(raw.get("shards"), "its number of shards", MOST_SHARDS)
    whole(raw.get("inputs"), "its number of inputs")
    whole(raw.get("sample_rate"), "its sample_rate")
    unique_fields(raw.get("fields"))
    _findings(raw.get("findings"))
    _options(raw)
    if not isinstance(raw.get("about"), dict):
        raise ValueError("its about is not an object")
    return raw


def read_report(out: Path, name: str) -> ShardReport | None:
    """The report of a shard; None if the shard is not finished."""
    file = report_file(out, name)
    try:
        report = parse_report(file.read_bytes(), name)
        entry = report.entry
        complete = not entry.samples or (
            (out / f"{name}.tar").stat().st_size == entry.bytes and (out / f"{name}.idx").exists()
        )
    except FileNotFoundError:
        return None
    except ValueError as error:
        log.warning("%s: is damaged (%s); its shard is converted again", file, error)
        return None
    return report if complete else None


def parse_report(content: bytes, name: str) -> ShardReport:
    """The content of the report of shard `name`. Raises ValueError."""
    raw = _object(content)
    entry = raw.get("entry")
    if not isinstance(entry, dict) or entry.keys() != {"name", *TOTALS, "sha256"}:
        raise ValueError("its entry is not that of a shard")
    if entry["name"] != name:
        raise ValueError(f"it is of the shard {ascii(entry['name'])[:40]}")
    for key in TOTALS:
        whole(entry[key], f"its {key}")
    digest = entry["sha256"]
    if not isinstance(digest, str) or bool(SHA256.fullmatch(digest)) != bool(entry["samples"]):
        raise ValueError("its sha256 is not that of a tar")
    findings = tuple(_findings(raw.get("findings")))
    return ShardReport(ShardEntry(**entry), findings, whole(raw.get("found"), "found"))


def report_file(out: Path, name: str) -> Path:
    return out / f"{name}.json"


def _options(raw: Mapping[str, Any]) -> None:
    options = raw.get("options")
    if not isinstance(options, dict) or not isinstance(options.get("split", {}), dict):
        raise ValueError("its options are not an object")


def _object(content: bytes) -> dict[str, Any]:
    try:
        raw = json.loads(content)
    except RecursionError as error:
        raise ValueError(str(error)) from None
    if not isinstance(raw, dict):
        raise ValueError("it is not a JSON object")
    return raw


def _findings(raw: object) -> Sequence[Finding]:
    if not isinstance(raw, list):
        raise ValueError("it has no list of findings")
    for one in raw:
        texts = isinstance(one, list) and len(one) == 3 and all(isinstance(t, str) for t in one)
        if not texts or one[2] not in KINDS:
            raise ValueError(f"a finding is {ascii(one)[:40]}")
    return [Finding(*one) for one in raw]
