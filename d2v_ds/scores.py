"""Scores of predictions: pure functions of predictions and references, and their intervals.

    predictions [n], references [n] --accuracy, f1, word_error_rate, glue ...--> a number
    the same --interval--> the bounds of its 95 % bootstrap interval

scikit-learn computes F1 and Matthews' correlation, scipy the correlations of Pearson and Spearman;
both are imported when they are first needed. n samples, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from d2v_ds.errors import UserError, suggestion

RESAMPLES = 1000
LEVEL = 0.95
ERROR_RATES = ("wer", "cer")  # names of metrics of which lower values are better

Column = Sequence[Any] | npt.NDArray[Any]
Floats = npt.NDArray[np.float64]
Metric = Callable[..., float]


def column(values: Column) -> npt.NDArray[Any]:
    return values if isinstance(values, np.ndarray) else np.array(values)


def paired(predictions: Column, references: Column) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Both as arrays. Raises ValueError unless they have the same length of at least 1."""
    if len(predictions) != len(references) or not len(references):
        raise ValueError(
            f"{len(predictions)} predictions for {len(references)} references, expected one each "
            "and at least one"
        )
    return column(predictions), column(references)


def needs(package: str) -> UserError:
    return UserError(
        f"this needs {package}, which is not installed; run `pip install 'd2v-ds[evaluate]'`"
    )


# ---------------------------------------------------------------------------------- classification


def accuracy(predictions: Column, references: Column) -> float:
    """The fraction of predictions that are equal to their reference."""
    given, wanted = paired(predictions, references)
    return float(np.mean(given == wanted))


def in_top(scores: npt.NDArray[Any], references: Column, k: int) -> npt.NDArray[np.bool_]:
    """Which references [n], class numbers, are among the k classes with the highest scores [n, C].
    Of equal scores the class with the lower number counts as higher."""
    _, wanted = paired(scores, references)
    best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    found: npt.NDArray[np.bool_] = (best == wanted[:, None]).any(1)
    return found


def top_k(scores: npt.NDArray[Any], references: Column, k: int) -> float:
    """The fraction of references among the k classes with the highest scores [n, C]."""
    return float(in_top(scores, references, k).mean())


def f1(predictions: Column, references: Column, positive: Any = 1) -> float:
    """The harmonic mean of precision and recall of the class `positive`; 0 if nothing was found."""
    try:
        from sklearn.metrics import f1_score
    except ImportError:
        raise needs("scikit-learn") from None
    given, wanted = paired(predictions, references)
    return float(f1_score(wanted == positive, given == positive, zero_division=0.0))


def matthews(predictions: Column, references: Column) -> float:
    """Matthews' correlation coefficient, for any number of classes; 0 if one side is constant."""
    try:
        from sklearn.metrics import matthews_corrcoef
    except ImportError:
        raise needs("scikit-learn") from None
    given, wanted = paired(predictions, references)
    if len(set(given.tolist()) | set(wanted.tolist())) == 1:
        return 0.0  # scikit-learn's value, without its warning
    return float(matthews_corrcoef(wanted, given))


# -------------------------------------------------------------------------------------- regression


def pearson(predictions: Column, references: Column) -> float:
    """Pearson's correlation; NaN, undefined, if one side is constant."""
    return _correlation("pearsonr", predictions, references)


def spearman(predictions: Column, references: Column) -> float:
    """Spearman's rank correlation; NaN, undefined, if one side is constant."""
    return _correlation("spearmanr", predictions, references)


def _correlation(name: str, predictions: Column, references: Column) -> float:
    try:
        from scipy import stats
    except ImportError:
        raise needs("scipy") from None
    given, wanted = paired(predictions, references)
    if np.ptp(given) == 0 or np.ptp(wanted) == 0:  # scipy warns
        return math.nan
    return float(getattr(stats, name)(given, wanted).statistic)


# ------------------------------------------------------------------------------------------ speech


def edit_distance(given: Sequence[Any], wanted: Sequence[Any]) -> int:
    """The smallest number of insertions, deletions and substitutions that turn one sequence into
    the other (Levenshtein). One vector operation per element of `given`, which is many times
    faster than torchaudio's loop over pairs."""
    numbers = {item: i for i, item in enumerate(dict.fromkeys([*given, *wanted]))}
    columns = np.array([numbers[item] for item in wanted], dtype=np.int64)
    steps = np.arange(len(wanted) + 1)
    row = steps
    for i, item in enumerate(given):
        best = np.empty_like(row)  # without insertions in this row
        best[0] = i + 1
        best[1:] = np.minimum(row[:-1] + (columns != numbers[item]), row[1:] + 1)
        row = np.minimum.accumulate(best - steps) + steps
    return int(row[-1])


def error_counts(
    predictions: Sequence[str], references: Sequence[str], unit: str = "word"
) -> tuple[Floats, Floats]:
    """(edits [n], length of the reference [n]) of each text. unit: "word", separated by white
    space, or "character", with single spaces between words."""
    paired(predictions, references)
    split = str.split if unit == "word" else (lambda text: " ".join(text.split()))
    pairs = [(split(p), split(r)) for p, r in zip(predictions, references, strict=True)]
    edits = np.array([edit_distance(given, wanted) for given, wanted in pairs], dtype=np.float64)
    return edits, np.array([len(wanted) for _, wanted in pairs], dtype=np.float64)


def error_rate(edits: Column, lengths: Column) -> float:
    """All edits divided by the length of all references, as usual for a corpus; not the mean of the
    ratios of its texts. NaN if all references are empty."""
    total = float(np.sum(lengths))
    return float(np.sum(edits)) / total if total else math.nan


def word_error_rate(predictions: Sequence[str], references: Sequence[str]) -> float:
    """WER of a corpus; may exceed 1."""
    return error_rate(*error_counts(predictions, references, "word"))


def character_error_rate(predictions: Sequence[str], references: Sequence[str]) -> float:
    """CER of a corpus; the spaces between words count as characters."""
    return error_rate(*error_counts(predictions, references, "character"))


# -------------------------------------------------------------------------------------------- GLUE

# The metrics of each task of GLUE (Wang et al. 2019); its score is their mean.
GLUE: dict[str, Mapping[str, Metric]] = {
    "cola": {"matthews": matthews},
    "mnli": {"accuracy": accuracy},
    "mrpc": {"accuracy": accuracy, "f1": f1},
    "qnli": {"accuracy": accuracy},
    "qqp": {"accuracy": accuracy, "f1": f1},
    "rte": {"accuracy": accuracy},
    "sst2": {"accuracy": accuracy},
    "stsb": {"pearson": pearson, "spearman": spearman},
    "wnli": {"accuracy": accuracy},
}


def glue(task: str, predictions: Column, references: Column) -> dict[str, float]:
    """The metrics of a task by name, and their mean as "score". Classes are numbers, and 1 is the
    positive class of F1. Raises UserError for an unknown task."""
    name = task.lower().replace("-", "")
    if name not in GLUE:
        raise UserError(f"{task}: no such task of GLUE{suggestion(name, GLUE)}")
    found = {key: metric(predictions, references) for key, metric in GLUE[name].items()}
    return {**found, "score": float(np.mean(list(found.values())))}


# --------------------------------------------------------------------------------------- intervals


def interval(
    metric: Metric,
    *columns: Column,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> tuple[float, float]:
    """The bounds of the percentile bootstrap interval of metric(*columns) over samples.

    columns: arguments of the metric with one entry per sample: predictions and references, or the
    edits and lengths of `error_counts`, which need not be counted again for each resample. The
    result depends only on the arguments. Resamples for which the metric is undefined are left out;
    NaN if it never is defined.
    """
    arrays = [column(each) for each in columns]
    rng = np.random.default_rng(seed)
    n = len(arrays[0])
    drawn = (rng.integers(n, size=n) for _ in range(resamples))
    values = np.array([metric(*(array[rows] for array in arrays)) for rows in drawn])
    values = values[~np.isnan(values)]
    if not len(values):
        return math.nan, math.nan
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
