"""Counts and lists of what a conversion finds: inputs left out, files passed over, inputs altered.

    findings of the plan and of the shards -> quarantine.jsonl, notes.jsonl, counts of index.json
                                           -> lines for the console

The kinds are those of d2v_ds/data/checks.py.
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from d2v_ds.data.checks import (
    ALTERED,
    KINDS,
    LEFT_OUT,
    OUTCOMES,
    PASSED_OVER,
    Finding,
    kind_of,
    listed,
)
from d2v_ds.files import write_atomically
from shards.walking import extension_of

QUARANTINE_FILE = "quarantine.jsonl"
NOTES_FILE = "notes.jsonl"
UNUSABLE = (ValueError, OSError, MemoryError)
"""What reading an input raises if it cannot be used. Sizes are checked before memory is taken, but
what is allowed may still be more than there is."""
FIRST = 3  # reasons in a message


def outcome(kind: str) -> str:
    """The entry of index.json that counts this kind."""
    if kind in PASSED_OVER:
        return "passed_over"
    return "altered" if kind in ALTERED else "left_out"


def unusable(findings: Iterable[Finding]) -> list[Finding]:
    """The findings that --max-bad limits: not duplicates, because their content is used."""
    return [found for found in findings if found.kind in LEFT_OUT and found.kind != "duplicate"]


def left_out(findings: Iterable[Finding]) -> list[Finding]:
    """The inputs that are not used, also those that an option leaves out."""
    return [found for found in findings if outcome(found.kind) == "left_out"]


def counts(findings: Iterable[Finding]) -> dict[str, dict[str, int]]:
    """{entry of index.json: {name: number}}, the most frequent first. Files of a type that no
    layout reads are counted by extension."""
    result: dict[str, Counter[str]] = {entry: Counter() for entry in OUTCOMES}
    for found in findings:
        label = found.kind
        if label == "type":
            label = extension_of(found.name) or "without extension"
        result[outcome(found.kind)][label] += 1
    return {entry: dict(counter.most_common()) for entry, counter in result.items()}


def write_lists(out: Path, findings: Iterable[Finding]) -> None:
    """Writes the two lists: what is left out, and what is passed over or altered."""
    lines: dict[str, list[str]] = {QUARANTINE_FILE: [], NOTES_FILE: []}
    for found in findings:
        line = {"path": found.name, "reason": found.reason, "kind": found.kind}
        file = QUARANTINE_FILE if outcome(found.kind) == "left_out" else NOTES_FILE
        lines[file].append(json.dumps(line) + "\n")
    for name, rows in lines.items():
        write_atomically(out / name, "".join(rows).encode())


def report(out: Path, about: Mapping[str, Any]) -> list[str]:
    """Lines for the console about a finished set. about: its index.json."""
    lines = []
    if about["quarantined"]:
        lines.append(
            f"{about['quarantined']} of {counted(about['inputs'])} {were(about['inputs'])} left out"
            f"{listed(about.get('left_out', {}))}; the reasons are in {out / QUARANTINE_FILE}"
        )
    for entry, noun, what in (
        ("passed_over", "file", "passed over"),
        ("altered", "input", "altered"),
    ):
        number = sum(about.get(entry, {}).values())
        if number:
            lines.append(
                f"{counted(number, noun)} {were(number)} {what}{listed(about[entry])}; the list is "
                f"in {out / NOTES_FILE}"
            )
    return lines


def counted(number: int, noun: str = "input") -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def were(number: int) -> str:
    return "was" if number == 1 else "were"


def not_chosen_line(number: int) -> str:
    return f"{counted(number)} {were(number)} not chosen (--only, --except)"


def report_of(
    findings: Collection[Finding], not_chosen: int = 0, planned: bool = False
) -> list[str]:
    """Lines for the console about findings that no set lists. planned: of a plan that is not
    carried out."""

    def verb(number: int) -> str:
        return "would be" if planned else were(number)

    lines = [not_chosen_line(not_chosen)] if not_chosen else []
    if bad := left_out(findings):
        lines.append(f"{counted(len(bad))} {verb(len(bad))} left out: {first_reasons(bad)}")
    numbers = counts(findings)
    for entry, noun in (("passed_over", "file"), ("altered", "input")):
        if numbers[entry]:
            number, what = sum(numbers[entry].values()), OUTCOMES[entry]
            lines.append(f"{counted(number, noun)} {verb(number)} {what}{listed(numbers[entry])}")
    return lines


def first_reasons(findings: Collection[Finding]) -> str:
    """The most frequent reasons, each with the number of inputs and the first of them."""
    groups: dict[str, list[Finding]] = {}
    for found in findings:
        groups.setdefault(masked(found.reason), []).append(found)
    most = sorted(groups.values(), key=len, reverse=True)
    parts = [
        f"{len(group)} x {group[0].reason} ({'the first: ' * (len(group) > 1)}{group[0].name})"
        for group in most[:FIRST]
    ]
    if len(most) > FIRST:
        parts.append(f"and {sum(map(len, most[FIRST:]))} with other reasons")
    return "; ".join(parts)


def masked(reason: str) -> str:
    """A reason with its numbers replaced by N, to count equal reasons. Numbers in names, such as
    UTF-8 and LATIN1, remain."""
    return re.sub(r"(?<![A-Za-z])(?<![A-Za-z]-)\b\d+(\.\d+)?", "N", reason)


def of_error(name: str, error: ValueError | OSError | MemoryError) -> Finding:
    """The finding about an input whose reading raised one of UNUSABLE."""
    if isinstance(error, MemoryError):
        return Finding(name, "needs more memory than there is", "size")
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
    if (
        isinstance(error, OSError)
        and error.errno in (errno.ENOENT, errno.ELOOP)
        and error.filename
        and os.path.islink(error.filename)
    ):
        return Finding(name, f"is a link to {os.readlink(error.filename)}: {reason}", "link")
    return Finding(name, reason, kind_of(error))


def normalised(findings: Iterable[tuple[str, ...]]) -> list[Finding]:
    """Findings of a layout; layouts outside this package may give pairs (name, reason)."""
    result = [Finding(*found) for found in findings]
    for found in result:
        assert found.kind in KINDS, f"{found.kind!r} is not a kind of finding ({', '.join(KINDS)})"
    return result
