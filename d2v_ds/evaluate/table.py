"""Results of probes as small tables of text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from d2v_ds.evaluate.labelled import Labelled, chance
from d2v_ds.evaluate.scoring import Result, Scorer


def format_results(title: str, scorer: Scorer, results: Mapping[str, Result]) -> str:
    """The accuracies below the names and sizes of the test sets; then the intervals, the top-5
    accuracies of more than five classes, and what was chosen on held-out samples."""
    tests = scorer.queries
    by_chance = {test.name: chance(test.labels) for test in tests}
    width = max(map(len, [*results, "chance"])) + 2

    def row(name: str, values: Mapping[str, Any], cell: Callable[[Any], str]) -> str:
        return f"{name:<{width}}" + "  ".join(f"{cell(values[test.name]):>14}" for test in tests)

    lines = [title, " " * width + "  ".join(f"{head(test):>14}" for test in tests)]
    lines += [row(name, result.accuracy, percent) for name, result in results.items()]
    lines += [row("chance", by_chance, percent), "95 % intervals"]
    lines += [row(name, result.interval, bounds) for name, result in results.items()]
    if len(scorer.names) > 5:
        lines.append("top-5 accuracy")
        lines += [row(name, result.top, percent) for name, result in results.items()]
    chosen = {name: result for name, result in results.items() if result.held_out}
    if chosen:
        lines += held_out_lines(chosen, scorer, width)
    return "\n".join(lines)


def held_out_lines(chosen: Mapping[str, Result], scorer: Scorer, width: int) -> list[str]:
    """One row for each encoder with the held-out accuracy of its blocks; * marks the chosen one."""
    held, strength = int(scorer.held.sum()), scorer.probe.strength
    lines = [f"held-out accuracy by block, {held} of {len(scorer.held)} training samples"]
    for name, result in chosen.items():
        cells = [
            f"{percent(accuracy)}{'*' if block == result.block and block else ' '}"
            for block, accuracy in result.held_out.items()
        ]
        more = f"  {strength} {result.strength:g}" if strength else ""
        lines.append(f"{name:<{width}}{' '.join(cells)}{more}".rstrip())
    return lines


def head(test: Labelled) -> str:
    return f"{test.name} ({len(test.labels)})"


def percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def bounds(interval: Sequence[float]) -> str:
    low, high = interval
    return f"{100 * low:.1f} - {100 * high:.1f}"
