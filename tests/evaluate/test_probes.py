"""Probes: each against a reference implementation or a case with a known answer; choices are made
on held-out training samples only."""

from __future__ import annotations

import logging
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.preprocessing import StandardScaler

from d2v_ds.errors import UserError
from d2v_ds.evaluate import probes
from d2v_ds.evaluate.labelled import held_out
from d2v_ds.evaluate.probes import PROBES, AttentivePool

C = 3


def clusters(n: int, seed: int, noise: float = 0.7, width: int = 6) -> tuple[np.ndarray, ...]:
    """Points around three centres far from the origin, and their classes."""
    centres = np.random.default_rng(0).standard_normal((C, width))
    rng = np.random.default_rng(seed)
    classes = rng.integers(C, size=n)
    points = 50 + 10 * (centres[classes] + noise * rng.standard_normal((n, width)))
    return points.astype(np.float32), classes


def sequences(n: int, seed: int) -> tuple[list[torch.Tensor], np.ndarray]:
    """Tokens of different numbers, of which one shows the class and is marked by a channel; the
    others show random classes, so their mean tells little."""
    rng = np.random.default_rng(seed)
    classes = rng.integers(C, size=n)
    samples = []
    for wanted in classes:
        shown = rng.integers(C, size=int(rng.integers(8, 20)))
        marked = rng.integers(len(shown))
        shown[marked] = wanted
        tokens = np.zeros((len(shown), 8), dtype=np.float32)
        tokens[np.arange(len(shown)), shown] = 1
        tokens[marked, 7] = 1
        tokens += 0.05 * rng.standard_normal(tokens.shape).astype(np.float32)
        samples.append(torch.from_numpy(tokens))
    return samples, classes


@pytest.mark.parametrize("name", ["knn", "ridge", "logistic", "linear"])
def test_probes_of_means_find_clusters(name: str) -> None:
    known, classes = clusters(120, 1)
    points, wanted = clusters(200, 2)
    probe = PROBES[name]
    strength = probe.strengths[len(probe.strengths) // 2]
    found = probe.fit(known, classes, C, strength)(points)
    assert found.shape == (200, C)
    assert 0.85 < (found.argmax(1) == wanted).mean() < 1.0
    again = probe.fit(known, classes, C, strength)(points)
    assert np.array_equal(found, again), "not deterministic"


@pytest.mark.parametrize("width", [6, 200])  # fewer and more channels than samples
def test_ridge_is_that_of_scikit_learn(width: int) -> None:
    known, classes = clusters(60, 1, width=width)
    points, _ = clusters(40, 2, width=width)
    scaler = StandardScaler().fit(known)
    expected = Ridge(alpha=0.1 * len(known)).fit(scaler.transform(known), np.eye(C)[classes])
    found = probes.fit_ridge(known, classes, C, 0.1)(points)
    np.testing.assert_allclose(found, expected.predict(scaler.transform(points)), atol=1e-4)


def test_logistic_regression_is_that_of_scikit_learn() -> None:
    known, classes = clusters(60, 1)
    points, _ = clusters(40, 2)
    scaler = StandardScaler().fit(known)
    expected = LogisticRegression(C=0.5, max_iter=1000).fit(scaler.transform(known), classes)
    found = probes.fit_logistic(known, classes, C, 0.5)(points)
    proba = expected.predict_log_proba(scaler.transform(points))
    np.testing.assert_allclose(found, proba, atol=1e-3)
    # A class that only the held-out part has is never predicted.
    without = probes.fit_logistic(known[classes > 0], classes[classes > 0], C, 0.5)(points)
    assert np.isneginf(without[:, 0]).all() and np.isfinite(without[:, 1:]).all()


def test_the_linear_probe_is_a_linear_layer() -> None:
    known, classes = clusters(60, 1)
    predict = probes.fit_linear(known, classes, C, 0.1)
    a, b = known[:20], known[20:40]
    np.testing.assert_allclose(predict((a + b) / 2), (predict(a) + predict(b)) / 2, atol=1e-4)


def test_attention_finds_the_token_that_matters() -> None:
    known, classes = sequences(300, 1)
    samples, wanted = sequences(200, 2)
    found = probes.fit_attentive(known, classes, C, 0.01)(samples)
    by_attention = (found.argmax(1) == wanted).mean()
    means, tests = (np.stack([s.mean(0).numpy() for s in x]) for x in (known, samples))
    by_mean = (probes.fit_linear(means, classes, C, 0.1)(tests).argmax(1) == wanted).mean()
    assert by_attention > 0.95 > 0.75 > by_mean


def test_attention_ignores_padding_and_starts_from_the_mean() -> None:
    torch.manual_seed(0)
    pool = AttentivePool(16, C)
    torch.nn.init.normal_(pool.head.weight)
    x, exists = torch.randn(2, 5, 16), torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    expected = torch.stack([pool.head(x[0].mean(0)), pool.head(x[1, :3].mean(0))])
    torch.testing.assert_close(pool(x, exists), expected)
    torch.nn.init.normal_(pool.query.weight)
    torch.testing.assert_close(pool(x, exists)[1:], pool(x[1:, :3], exists[1:, :3]))
    assert not torch.allclose(pool(x, exists), expected)
    assert AttentivePool(9, C).heads == 1


def test_the_held_out_part_has_every_class_with_several_samples() -> None:
    classes = [0] * 50 + [1] * 10 + [2] * 2 + [3]
    held = held_out(classes, 0.2)
    assert Counter(np.array(classes)[held].tolist()) == {0: 10, 1: 2, 2: 1}
    assert np.array_equal(held, held_out(classes, 0.2))
    assert not np.array_equal(held, held_out(classes, 0.2, seed=1))


def test_a_regression_that_does_not_converge_is_reported(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    known, classes = clusters(60, 1)

    def impatient(**settings: float) -> LogisticRegression:
        return LogisticRegression(C=settings["C"], max_iter=1)

    monkeypatch.setattr("sklearn.linear_model.LogisticRegression", impatient)
    with caplog.at_level(logging.WARNING, "d2v_ds"):
        probes.fit_logistic(known, classes, C, 100.0)
    assert "logistic regression with C=100 has not converged" in caplog.text


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    known, classes = clusters(20, 1)
    with pytest.raises(UserError, match=r"needs scikit-learn.*pip install 'd2v-ds\[evaluate\]'"):
        probes.fit_logistic(known, classes, C, 1.0)
