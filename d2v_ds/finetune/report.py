"""The scalars of fine-tuning while it trains, and the metrics of a validation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from d2v_ds import scores
from d2v_ds.task import Report, Sums


class FinetuneReport(Report):
    """The scalars of fine-tuning."""

    tags: ClassVar[dict[str, str]] = {"loss": "loss/total", "impossible": "data/impossible"}

    def summarize(self, sums: Sums, steps: float) -> dict[str, float]:
        """impossible: transcripts that are too long for their recordings, per step."""
        found = {"loss": float(sums["loss"]) / steps}
        if "impossible" in sums:
            found["impossible"] = float(sums["impossible"]) / steps
        return found

    def line(self, row: Mapping[str, float]) -> str:
        return f"loss {row['loss']:.4f}"

    def warnings(self, row: Mapping[str, float]) -> list[str]:
        if row.get("impossible", 0) > 0:
            return [
                f"{row['impossible']:g} transcripts per step have more symbols than their "
                "recordings have tokens, so they are not learnt"
            ]
        return []


TOP = 5


def best_classes(logits: Tensor) -> list[list[int]]:
    """The numbers of the five classes with the highest logits [B, C], the best first."""
    best: list[list[int]] = logits.topk(min(TOP, logits.shape[1])).indices.tolist()
    return best


def score(metric: str, given: Any, wanted: Any) -> dict[str, float]:
    """The metrics of predictions and references, as `outcomes` returns them."""
    if metric in scores.ERROR_RATES:
        return {
            "wer": scores.word_error_rate(given, wanted),
            "cer": scores.character_error_rate(given, wanted),
        }
    if "pearson" in metric or "spearman" in metric:
        found = {
            "pearson": scores.pearson(given, wanted),
            "spearman": scores.spearman(given, wanted),
        }
        return {**found, "pearson_spearman": float(np.mean(list(found.values())))}
    first = [five[0] for five in given]
    found = {"accuracy": scores.accuracy(first, wanted)}
    if len(given[0]) == TOP:
        hits = [label in five for five, label in zip(given, wanted, strict=True)]
        found["top5"] = float(np.mean(hits))
    if metric == "matthews":
        found["matthews"] = scores.matthews(first, wanted)
    if metric in ("f1", "accuracy_f1"):
        found["f1"] = scores.f1(first, wanted)
        found["accuracy_f1"] = (found["accuracy"] + found["f1"]) / 2
    return found
