"""Scores: compared with values computed by hand and with the libraries."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2v_ds import scores
from d2v_ds.data.audio import import_torchaudio
from d2v_ds.errors import UserError


def test_accuracy_and_top_k() -> None:
    assert scores.accuracy(["a", "b", "c", "a"], ["a", "b", "a", "c"]) == 0.5
    table = np.array([[0.1, 0.9, 0.5], [0.3, 0.2, 0.1], [0.0, 0.0, 1.0]])
    assert scores.top_k(table, [1, 2, 0], 1) == pytest.approx(1 / 3)
    # Row 2 has equal scores for the classes 0 and 1; the lower number counts as higher.
    assert scores.in_top(table, [2, 2, 0], 2).tolist() == [True, False, True]
    assert scores.top_k(table, [2, 2, 1], 2) == pytest.approx(1 / 3)
    assert scores.top_k(table, [0, 1, 2], 3) == scores.top_k(table, [0, 1, 2], 5) == 1.0


def test_f1_and_matthews_by_hand() -> None:
    predictions, references = [1, 1, 1, 0, 0, 0], [1, 1, 0, 1, 0, 0]  # TP 2, FP 1, FN 1, TN 2
    assert scores.f1(predictions, references) == pytest.approx(2 / 3)
    assert scores.matthews(predictions, references) == pytest.approx((2 * 2 - 1) / 9)
    assert scores.f1([0, 0], [0, 0]) == 0.0 and scores.f1(["b"], ["b"], positive="b") == 1.0
    assert scores.matthews([1, 1], [1, 1]) == scores.matthews([0, 0], [0, 1]) == 0.0


def test_correlations_by_hand() -> None:
    # Deviations (-1, 0, 1) and (-2, -1, 3): 5 / sqrt(2 * 14).
    assert scores.pearson([1, 2, 3], [0, 1, 5]) == pytest.approx(5 / math.sqrt(28))
    assert scores.spearman([1, 2, 3], [0, 1, 5]) == pytest.approx(1.0)
    assert scores.spearman([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(0.8)  # 1 - 6 * 2 / 60
    assert math.isnan(scores.pearson([1, 1], [0, 1])) and math.isnan(
        scores.spearman([0, 1], [2, 2])
    )


def test_libraries_agree() -> None:
    from scipy import stats
    from sklearn import metrics

    rng = np.random.default_rng(0)
    references = rng.integers(2, size=200)
    predictions = np.where(rng.random(200) < 0.7, references, 1 - references)
    assert scores.accuracy(predictions, references) == pytest.approx(
        metrics.accuracy_score(references, predictions)
    )
    assert scores.f1(predictions, references) == pytest.approx(
        metrics.f1_score(references, predictions)
    )
    assert scores.matthews(predictions, references) == pytest.approx(
        metrics.matthews_corrcoef(references, predictions)
    )
    table = rng.random((200, 7))
    wanted = rng.integers(7, size=200)
    assert scores.top_k(table, wanted, 3) == pytest.approx(
        metrics.top_k_accuracy_score(wanted, table, k=3, labels=range(7))
    )
    x, y = rng.random(50), rng.random(50)
    assert scores.pearson(x, y) == pytest.approx(stats.pearsonr(x, y)[0])
    assert scores.spearman(x, y) == pytest.approx(stats.spearmanr(x, y)[0])


# ----------------------------------------------------------------------------------- edit distance


def test_edit_distance_by_hand() -> None:
    assert scores.edit_distance("kitten", "sitting") == 3
    assert scores.edit_distance("", "abc") == scores.edit_distance("abc", "") == 3
    assert scores.edit_distance("", "") == 0
    assert scores.edit_distance("the cat".split(), "the black cat".split()) == 1


@given(st.text("abc", max_size=12), st.text("abcd", max_size=12))
def test_edit_distance_is_that_of_torchaudio(left: str, right: str) -> None:
    expected = import_torchaudio().functional.edit_distance(left, right)
    assert scores.edit_distance(left, right) == expected


def test_errors_are_counted_over_the_corpus() -> None:
    references = ["one", "a long text of seven short words"]
    predictions = ["two words", "a long text of seven short words"]
    # One substitution and one insertion, 8 words. The mean of the ratios would be 1.
    assert scores.word_error_rate(predictions, references) == pytest.approx(2 / 8)
    assert scores.character_error_rate(["a  c "], ["abc"]) == pytest.approx(1 / 3)
    assert scores.error_counts(["x"], [""])[0].tolist() == [1]
    assert math.isnan(scores.word_error_rate(["x"], [""]))


# ------------------------------------------------------------------------------------------ GLUE


def test_the_metrics_of_glue() -> None:
    predictions, references = [1, 1, 1, 0, 0, 0], [1, 1, 0, 1, 0, 1]
    cola = scores.glue("CoLA", predictions, references)
    assert cola == {"matthews": scores.matthews(predictions, references), "score": cola["matthews"]}
    for task in ("MRPC", "QQP"):
        found = scores.glue(task, predictions, references)
        assert found["accuracy"] == pytest.approx(0.5) and found["f1"] == pytest.approx(4 / 7)
        assert found["score"] == pytest.approx((0.5 + 4 / 7) / 2)
    stsb = scores.glue("STS-B", [1.0, 2, 3, 4], [1.0, 3, 2, 4])
    assert stsb == pytest.approx({"pearson": 0.8, "spearman": 0.8, "score": 0.8})
    for task in ("SST-2", "MNLI", "QNLI", "RTE", "WNLI"):
        assert scores.glue(task, predictions, references)["score"] == pytest.approx(0.5)
    with pytest.raises(UserError, match="sst3: no such task of GLUE; did you mean 'sst2'"):
        scores.glue("sst3", predictions, references)


# -------------------------------------------------------------------------------------- intervals


def test_an_interval_has_the_width_that_theory_gives() -> None:
    references = np.zeros(400)
    predictions = (np.arange(400) % 5 == 0).astype(float)  # accuracy 0.8
    low, high = scores.interval(scores.accuracy, predictions, references)
    half = 1.96 * math.sqrt(0.8 * 0.2 / 400)
    assert low == pytest.approx(0.8 - half, abs=0.01)
    assert high == pytest.approx(0.8 + half, abs=0.01)
    assert (low, high) == scores.interval(scores.accuracy, predictions, references)
    assert (low, high) != scores.interval(scores.accuracy, predictions, references, seed=1)


def test_intervals_of_all_metrics() -> None:
    rng = np.random.default_rng(0)
    references = rng.integers(2, size=60)
    predictions = np.where(rng.random(60) < 0.8, references, 1 - references)
    for metric in (scores.accuracy, scores.f1, scores.matthews, scores.pearson, scores.spearman):
        low, high = scores.interval(metric, predictions, references, resamples=100)
        assert low < metric(predictions, references) < high, metric
    table = rng.random((60, 4))
    low, high = scores.interval(lambda s, r: scores.top_k(s, r, 2), table, references, resamples=50)
    assert low < scores.top_k(table, references, 2) < high
    texts = [" ".join(rng.choice(list("abcd"), 6)) for _ in range(40)]
    guesses = [text.replace("a", "b") if i % 2 else text for i, text in enumerate(texts)]
    counts = scores.error_counts(guesses, texts)
    fast = scores.interval(scores.error_rate, *counts, resamples=50)
    assert fast == scores.interval(scores.word_error_rate, guesses, texts, resamples=50)
    assert fast[0] < scores.word_error_rate(guesses, texts) < fast[1]


def test_undefined_resamples_are_left_out() -> None:
    assert all(map(math.isnan, scores.interval(scores.pearson, [1.0, 1.0], [0.0, 1.0])))
    low, high = scores.interval(scores.pearson, [1.0, 2.0], [1.0, 2.0])  # half of them are constant
    assert low == high == pytest.approx(1.0)


# ------------------------------------------------------------------------------------------ errors


def test_unequal_lengths_are_refused() -> None:
    for predictions, references in (([1], [1, 2]), ([], [])):
        with pytest.raises(ValueError, match="expected one each and at least one"):
            scores.accuracy(predictions, references)


@pytest.mark.parametrize(
    ("package", "metric"),
    [("sklearn.metrics", "f1"), ("sklearn.metrics", "matthews"), ("scipy", "pearson")],
)
def test_a_missing_package_names_the_extra(
    package: str, metric: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=r"pip install 'd2v-ds\[evaluate\]'"):
        getattr(scores, metric)([1, 0], [1, 0])
