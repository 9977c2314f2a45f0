"""Estimates the inputs, shards, bytes and time of a conversion by converting a few samples.

plan of each set -> a few samples converted, nothing written -> lines
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping

from d2v_ds.data.checks import Finding
from d2v_ds.files import format_size
from shards.family import Converter, PackedMember, Sample
from shards.findings import counted, first_reasons, left_out, report_of
from shards.plan import ConversionPlan

SAMPLES = 32  # to convert, over all sets
SECONDS = 10.0  # approximate time limit
TAR = 1024  # approximate bytes of header and padding per member


def estimate(plans: Mapping[str, ConversionPlan], converter: Converter, jobs: int) -> Iterator[str]:
    """One line per set, then one for the time."""
    few = max(1, SAMPLES // len(plans))
    given = made = 0
    bad: list[Finding] = []
    _convert(converter, next(iter(plans.values())).samples[0])  # warms up imports and caches
    start = time.perf_counter()
    for plan in plans.values():
        for sample in _spread(plan, few):
            size, findings = _convert(converter, sample)
            given, made, bad = given + sample.size, made + size, bad + findings
            if time.perf_counter() - start > SECONDS:
                break
    seconds = time.perf_counter() - start
    total = 0
    for plan in plans.values():
        yield from report_of(plan.findings, plan.not_chosen, planned=True)
    yield from {plan.remark: None for plan in plans.values() if plan.remark}
    for name, plan in plans.items():
        total += plan.bytes
        yield (
            f"{name or 'set'}: {counted(plan.inputs)}, {format_size(plan.bytes)} -> "
            f"{plan.shards:,} shard{'' if plan.shards == 1 else 's'}, about "
            f"{format_size(plan.bytes * made / max(1, given))}"
        )
    hours = seconds * total / max(1, given) / 3600
    yield (
        f"about {_duration(hours)} on one core, {_duration(hours / jobs)} with --jobs {jobs}; "
        f"measured on {format_size(given)} of input"
        + (f" ({counted(len(bad))} cannot be used: {first_reasons(bad)})" if bad else "")
    )


def _spread(plan: ConversionPlan, few: int) -> Iterator[Sample]:
    number = len(plan.samples)
    return map(plan.samples.__getitem__, sorted({number * i // few for i in range(few)}))


def _convert(converter: Converter, sample: Sample) -> tuple[int, list[Finding]]:
    """(bytes of the members, inputs left out)."""
    size, bad = 0, list[Finding]()
    for made in converter.convert([sample]):
        bad += left_out(made.findings)
        payloads = [made.payload] if isinstance(made, PackedMember) else made.members
        size += sum(len(payload) + TAR for payload in payloads if payload is not None)
    return size, bad


def _duration(hours: float) -> str:
    if hours >= 1:
        return f"{hours:.1f} hours"
    return f"{hours * 60:.1f} minutes" if hours * 60 >= 1 else f"{hours * 3600:.1f} seconds"
