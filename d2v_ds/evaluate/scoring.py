"""The scores of one encoder: fits a probe on features of a training set and scores test sets.

features --Scorer.choose--> block and strength    --Scorer.score--> Result

Blocks and strengths are chosen on a held-out part of the training set; then the probe is fitted
again on the whole training set. The test sets take no part in any choice.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from d2v_ds import scores
from d2v_ds.errors import UserError
from d2v_ds.evaluate.labelled import Labelled, held_out
from d2v_ds.evaluate.probes import Classes, Probe

log = logging.getLogger("d2v_ds")

HELD_OUT = 0.2  # of the training set
TOP = 5

OfBlock = Callable[[Labelled, int], Any]  # (set, block) -> features of its samples


@dataclass(frozen=True)
class Result:
    """What one encoder, or the plain features, scored."""

    block: int
    strength: float
    held_out: dict[int, float]  # accuracy on the held-out part, by block; empty: nothing to choose
    accuracy: dict[str, float] = field(default_factory=dict)  # by test set
    top: dict[str, float] = field(default_factory=dict)  # top-5 accuracy
    interval: dict[str, tuple[float, float]] = field(default_factory=dict)  # 95 %, of the accuracy


class Scorer:
    """Fits a probe on one set and scores the others."""

    def __init__(self, probe: Probe, known: Labelled, queries: Sequence[Labelled]) -> None:
        self.probe, self.known, self.queries = probe, known, queries
        self.names = sorted(set(known.labels))
        if len(self.names) < 2:
            raise UserError(
                f"{known.shards.root}: all labels are {self.names[0]!r}; a probe needs at least "
                "two classes"
            )
        self.classes = self.numbers(known.labels)
        self.held = held_out(self.classes.tolist(), HELD_OUT)
        for labelled in queries:
            self.warn_of_new_labels(labelled)

    def numbers(self, labels: Iterable[str]) -> Classes:
        """The class of each label; -1 for labels that the training set does not have."""
        number = {name: i for i, name in enumerate(self.names)}
        return np.array([number.get(label, -1) for label in labels])

    def warn_of_new_labels(self, labelled: Labelled) -> None:
        new = sorted(set(labelled.labels) - set(self.names))
        if new:
            log.warning(
                "%s: %d of %d samples have labels that the training set does not have (%s); they "
                "count as errors",
                labelled.name,
                sum(label in new for label in labelled.labels),
                len(labelled.labels),
                ", ".join(new[:3]) + (", ..." if len(new) > 3 else ""),
            )

    def score(self, features: OfBlock, blocks: list[int]) -> Result:
        """The scores of one encoder, with the block and the strength that are best on the held-out
        part of the training set."""
        result = self.choose(features, blocks)
        known = features(self.known, result.block)
        predict = self.probe.fit(known, self.classes, len(self.names), result.strength)
        for labelled in self.queries:
            table = predict(features(labelled, result.block))
            wanted = self.numbers(labelled.labels)
            right = scores.in_top(table, wanted, 1)
            result.accuracy[labelled.name] = float(right.mean())
            result.top[labelled.name] = scores.top_k(table, wanted, TOP)
            result.interval[labelled.name] = scores.interval(np.mean, right)
        return result

    def choose(self, features: OfBlock, blocks: list[int]) -> Result:
        """The best block and strength. Of equal ones the first: the lower block, and for ridge and
        logistic regression the stronger penalty."""
        strengths = self.probe.strengths
        if len(blocks) == len(strengths) == 1:
            return Result(blocks[0], strengths[0], {})
        if not self.held.any():
            raise UserError(
                f"{self.known.shards.root}: has one sample of each class, so nothing can be held "
                "out to choose the probe's settings; give more samples"
            )
        best: dict[int, tuple[float, float]] = {}  # accuracy and strength
        for block in blocks:
            of_block = features(self.known, block)
            found = [(self.held_accuracy(of_block, strength), strength) for strength in strengths]
            best[block] = max(found, key=lambda pair: pair[0])
        block = max(blocks, key=lambda block: best[block][0])
        return Result(block, best[block][1], {b: accuracy for b, (accuracy, _) in best.items()})

    def held_accuracy(self, features: Any, strength: float) -> float:
        rest = take(features, ~self.held)
        predict = self.probe.fit(rest, self.classes[~self.held], len(self.names), strength)
        found = predict(take(features, self.held))
        return float(scores.in_top(found, self.classes[self.held], 1).mean())


def take(features: Any, rows: npt.NDArray[np.bool_]) -> Any:
    """The chosen rows of an array, or of a list of tokens."""
    if isinstance(features, list):
        return [row for row, kept in zip(features, rows, strict=True) if kept]
    return features[rows]
