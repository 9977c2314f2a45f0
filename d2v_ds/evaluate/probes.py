"""Probes: classifiers on frozen features. Each is fitted with one strength, a number that is chosen
on held-out data, and returns a function from features to class scores.

    features [n, D] of the training set, labels --fit--> (features [m, D] -> scores [m, C])

The attentive probe takes the tokens of each sample instead, a list of [T, D]. Everything is
deterministic. n, m samples, T tokens, D width, C classes, H heads.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from d2v_ds.evaluate.embedding import Features, Tokens
from d2v_ds.scores import needs

log = logging.getLogger("d2v_ds")

Classes = npt.NDArray[np.int64]  # a class number for each sample
Scores = npt.NDArray[np.float32]
Predict = Callable[[Any], Scores]

NEIGHBOURS = 10
# Votes are weighted by exp(similarity / temperature), as in DINO's kNN (Caron et al. 2021).
TEMPERATURE = 0.07
EPOCHS = 100  # of the probes that are trained by gradient descent
BATCH = 256
HEADS = 8  # of the attentive probe, if they divide D
SMALLEST = 1e-6  # added to standard deviations


@dataclass(frozen=True)
class Probe:
    """fit(features, classes, C, strength) -> Predict. tokens: takes the tokens of each sample
    instead of their mean."""

    title: str
    fit: Callable[[Any, Classes, int, float], Predict]
    strength: str = ""  # the name of the strength
    strengths: tuple[float, ...] = (0.0,)
    tokens: bool = False


# --------------------------------------------------------------------------------------------- kNN


def fit_knn(known: Features, classes: Classes, C: int, _: float = 0.0) -> Predict:
    """Votes of the nearest training samples, by cosine similarity of standardised features."""
    standardise = standardiser(known)
    rows = F.normalize(standardise(known), dim=1)
    label = torch.from_numpy(classes)

    def predict(features: Features) -> Scores:
        points = F.normalize(standardise(features), dim=1)
        similarity, nearest = (points @ rows.T).topk(min(NEIGHBOURS, len(rows)))
        votes = torch.zeros(len(points), C)
        votes.scatter_add_(1, label[nearest], (similarity / TEMPERATURE).exp())
        return votes.numpy()

    return predict


def standardiser(known: Features) -> Callable[[Features], Tensor]:
    """The function that subtracts the mean and divides by the standard deviation of `known`."""
    mean, std = known.mean(0), known.std(0) + SMALLEST
    return lambda features: torch.from_numpy((features - mean) / std)


def knn_accuracy(
    gallery: Features, gallery_labels: list[str], queries: Features, query_labels: list[str]
) -> float:
    """The fraction of queries whose label gets the most votes from the nearest gallery rows."""
    names = sorted(set(gallery_labels))
    classes = np.array([names.index(label) for label in gallery_labels])
    best = fit_knn(gallery, classes, len(names))(queries).argmax(1)
    return float(np.mean([names[i] == q for i, q in zip(best, query_labels, strict=True)]))


# ------------------------------------------------------------------------------------------- ridge


def fit_ridge(known: Features, classes: Classes, C: int, alpha: float) -> Predict:
    """Ridge regression of the one-hot classes on standardised features, in closed form. alpha: the
    penalty per training sample."""
    standardise = standardiser(known)
    x = standardise(known).double()
    y = F.one_hot(torch.from_numpy(classes), C).double()
    shift = y.mean(0)  # x has mean zero, so this is the intercept
    penalty = alpha * len(x)
    if x.shape[1] > len(x):  # the same solution from the smaller matrix
        weight = x.T @ torch.linalg.solve(x @ x.T + penalty * torch.eye(len(x)), y - shift)
    else:
        weight = torch.linalg.solve(x.T @ x + penalty * torch.eye(x.shape[1]), x.T @ (y - shift))
    return lambda features: (standardise(features).double() @ weight + shift).float().numpy()


# ---------------------------------------------------------------------------------------- logistic


def fit_logistic(known: Features, classes: Classes, C: int, inverse: float) -> Predict:
    """scikit-learn's logistic regression on standardised features. inverse: its C, the inverse of
    the L2 penalty. Raises UserError if scikit-learn is not installed."""
    try:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression
    except ImportError:
        raise needs("scikit-learn") from None
    standardise = standardiser(known)
    model = LogisticRegression(C=inverse, max_iter=1000)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", ConvergenceWarning)
        model.fit(standardise(known).numpy(), classes)
    if caught:
        log.warning("logistic regression with C=%g has not converged", inverse)

    def predict(features: Features) -> Scores:
        found = model.predict_log_proba(standardise(features).numpy())
        scores = np.full((len(features), C), -np.inf, dtype=np.float32)
        scores[:, model.classes_] = found  # classes without a training sample stay impossible
        return scores

    return predict


# ------------------------------------------------------------------------- trained by gradients


def fit_linear(known: Features, classes: Classes, C: int, rate: float) -> Predict:
    """A linear layer on standardised features: softmax, SGD with momentum and a cosine schedule, no
    weight decay. rate: its learning rate."""
    standardise = standardiser(known)
    x = standardise(known)
    model = nn.Linear(x.shape[1], C)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    descend(optimizer, classes, lambda rows: model(x[rows]))

    def predict(features: Features) -> Scores:
        with torch.no_grad():
            return model(standardise(features)).numpy()  # type: ignore[no-any-return]

    return predict


class AttentivePool(nn.Module):
    """Tokens [B, T, D] -> class scores [B, C]. Each of H heads has a learned query, whose softmax
    over the tokens weights its share of the channels; a linear layer follows. At first all tokens
    have the same weight, so that training starts from mean pooling."""

    def __init__(self, dim: int, classes: int) -> None:
        super().__init__()
        self.heads = HEADS if dim % HEADS == 0 else 1
        self.query = nn.Linear(dim, self.heads, bias=False)
        self.head = nn.Linear(dim, classes)
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, exists: Tensor) -> Tensor:
        """exists: [B, T] bool, False for padding."""
        weight = self.query(x).masked_fill(~exists[:, :, None], float("-inf")).softmax(1)
        values = x.view(*x.shape[:2], self.heads, -1)  # [B, T, H, D / H]
        pooled = (weight[:, :, :, None] * values).sum(1).flatten(1)  # [B, D]
        return self.head(pooled)  # type: ignore[no-any-return]


def fit_attentive(known: Tokens, classes: Classes, C: int, rate: float) -> Predict:
    """Attention pooling and a linear layer on standardised tokens, trained with Adam and a cosine
    schedule. rate: its learning rate."""
    total = sum(len(tokens) for tokens in known)
    mean = torch.stack([tokens.sum(0) for tokens in known]).sum(0) / total
    squares = torch.stack([(tokens - mean).square().sum(0) for tokens in known]).sum(0)
    std = (squares / total).sqrt() + SMALLEST
    model = AttentivePool(len(mean), C)

    def scores(samples: Tokens) -> Tensor:
        lengths = torch.tensor([len(tokens) for tokens in samples])
        x = pad_sequence([(tokens - mean) / std for tokens in samples], batch_first=True)
        return model(x, torch.arange(x.shape[1]) < lengths[:, None])  # type: ignore[no-any-return]

    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    descend(optimizer, classes, lambda rows: scores([known[i] for i in rows.tolist()]))

    @torch.no_grad()
    def predict(samples: Tokens) -> Scores:
        groups = [samples[i : i + BATCH] for i in range(0, len(samples), BATCH)]
        return torch.cat([scores(group) for group in groups]).numpy()

    return predict


def descend(
    optimizer: torch.optim.Optimizer, classes: Classes, scores: Callable[[Tensor], Tensor]
) -> None:
    """EPOCHS passes over the training samples in batches of BATCH, in an order that is drawn with a
    fixed seed. scores: rows [B] -> class scores [B, C]."""
    target = torch.from_numpy(classes)
    n, rng = len(classes), torch.Generator().manual_seed(0)
    steps = EPOCHS * -(-n // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(EPOCHS):
        order = torch.randperm(n, generator=rng)
        for start in range(0, n, BATCH):
            rows = order[start : start + BATCH]
            optimizer.zero_grad()
            loss = F.cross_entropy(scores(rows), target[rows])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()


PROBES = {
    "knn": Probe("kNN", fit_knn),
    "ridge": Probe("Ridge", fit_ridge, "alpha", tuple(10.0**i for i in range(2, -7, -1))),
    "logistic": Probe(
        "Logistic regression", fit_logistic, "C", tuple(10.0**i for i in range(-4, 3))
    ),
    "linear": Probe("Linear probe", fit_linear, "learning rate", (0.001, 0.01, 0.1)),
    "attentive": Probe(
        "Attentive probe", fit_attentive, "learning rate", (0.001, 0.01), tokens=True
    ),
}
