"""Estimates the inputs, shards, bytes and time of a conversion by converting a few samples.

plan of each set -> a few samples converted, nothing written -> lines

The conversion opens a recording once for all of its segments, so these are converted together here
too.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping

from d2v_ds.data.checks import Finding
from d2v_ds.files import format_size
from shards.family import Converter, PackedMember, Sample
from shards.findings import counted, first_reasons, left_out, report_of, unusable
from shards.plan import ConversionPlan

SAMPLES = 32  # to convert, over all sets; the last recording is converted to its end
SECONDS = 10.0  # approximate time limit
TAR = 1024  # approximate bytes of header and padding per member


def estimate(
    plans: Mapping[str, ConversionPlan], converter: Converter, jobs: int, max_bad: float
) -> Iterator[str]:
    """One line per set, then one for the time, then one per set that --max-bad may stop."""
    few = max(1, SAMPLES // len(plans))
    given = made = inputs = 0
    bad: list[Finding] = []
    shares: dict[str, tuple[float, bool]] = {}
    _convert(converter, [next(iter(plans.values())).samples[0]])  # warms up imports and caches
    start = time.perf_counter()

    def in_time(samples: Iterable[Sample]) -> Iterator[Sample]:
        nonlocal given, inputs
        for sample in samples:
            yield sample
            given += sample.size
            inputs += len(sample.inputs)
            if time.perf_counter() - start > SECONDS:
                return

    for name, plan in plans.items():
        before = inputs, len(unusable(bad))
        for samples in _spread(plan, few):
            size, findings, found = _convert(converter, in_time(samples))
            made, bad, inputs = made + size, bad + findings, inputs + found
            if time.perf_counter() - start > SECONDS:
                break
        measured, unused = inputs - before[0], len(unusable(bad)) - before[1]
        share = _share(plan, unused / max(1, measured))
        shares[name] = share, measured >= plan.inputs or _share(plan, 0.0) > max_bad
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
    for name, (share, certain) in shares.items():
        if share > max_bad:
            yield (
                f"{name or 'set'}: about {share:.2%} of the inputs cannot be used, more than "
                f"--max-bad {max_bad:.3%} allows: the conversion {'would' if certain else 'may'} "
                "stop"
            )


def _share(plan: ConversionPlan, measured: float) -> float:
    """The share of the inputs of a set that cannot be used. measured: of those that are read."""
    planned = len(unusable(plan.findings))
    return (planned + measured * plan.inputs) / (plan.inputs + len(left_out(plan.findings)))


def _spread(plan: ConversionPlan, few: int) -> Iterator[list[Sample]]:
    """About `few` samples of a plan, in groups: the segments of a recording, or one sample."""
    number = len(plan.order)
    taken = end = 0
    for start in sorted({number * i // few for i in range(few)}):
        if start < end or taken >= few:
            continue
        while start and _continues(plan, start):
            start -= 1
        end = start + 1
        while end < number and _continues(plan, end):
            end += 1
        taken += end - start
        yield [plan.samples[int(j)] for j in plan.order[start:end]]


def _continues(plan: ConversionPlan, at: int) -> bool:
    """Whether a sample is a segment of the recording of the sample before."""
    before, own = (int(j) for j in plan.order[at - 1 : at + 1])
    samples = plan.samples
    return bool(
        samples.shared[before]
        and samples.shared[own]
        and samples[before].inputs[0].path == samples[own].inputs[0].path
    )


def _convert(converter: Converter, samples: Iterable[Sample]) -> tuple[int, list[Finding], int]:
    """(bytes of the members, inputs left out, inputs beyond those in the plan)."""
    size, bad, found = 0, list[Finding](), 0
    for made in converter.convert(samples):
        found += made.found
        bad += left_out(made.findings)
        payloads = [made.payload] if isinstance(made, PackedMember) else made.members
        size += sum(len(payload) + TAR for payload in payloads if payload is not None)
    return size, bad, found


def _duration(hours: float) -> str:
    if hours >= 1:
        return f"{hours:.1f} hours"
    return f"{hours * 60:.1f} minutes" if hours * 60 >= 1 else f"{hours * 3600:.1f} seconds"
