"""Masks: pure functions of (shape, settings, generator) -> bool arrays, True where masked.

A modality's collate calls one of them per sample, with the generator of that sample, and
batch.mask_indices turns the result into indices. `block_count` and `uniform_count` give the number
of masked tokens without drawing, so that the loader can plan with it. The number is random for span
and BEiT masks. Each docstring names the original function, which is in fairseq/data/data_utils.py
unless stated otherwise.

M masked views, T tokens, [h, w] a grid of h * w patches.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Mask = npt.NDArray[np.bool_]
Tokens = npt.NDArray[np.int64]

ATTEMPTS = 10  # attempts to place one block in BEiT's generator


# ------------------------------------------------------------------------------------------- spans


def span_mask(T: int, *, prob: float, length: int, views: int, rng: np.random.Generator) -> Mask:
    """Spans of data2vec 1.0 speech -> [M, T]; the number of masked tokens varies between views.

    Draws floor(prob * T / length + u) spans, at least one. Their starts are drawn without
    replacement from [0, T - length), so that the last token is never masked (fairseq
    compute_mask_indices). Unlike fairseq, does not trim the masks of a batch to the smallest
    number. Spans are at most T - 1 long, so that at least one token stays visible; T = 1 is not
    masked.
    """
    if T == 1:
        return np.zeros((views, 1), dtype=bool)
    length = min(length, T - 1)
    counts = np.maximum(1, _span_counts(T, prob, length, views, rng))
    return _spread(_starts(counts, T - length, rng), T, length)


def token_span_mask(
    T: int, *, prob: float, length: int, views: int, rng: np.random.Generator
) -> Mask:
    """Spans of data2vec 1.0 text -> [M, T]; the number of masked tokens varies between views and
    may be 0.

    Draws floor(prob * T / length + u) spans. Their starts are drawn without replacement from
    [0, T), and spans are cut at the end (fairseq data/mask_tokens_dataset.py).
    """
    counts = _span_counts(T, prob, length, views, rng)
    return _spread(_starts(counts, T, rng), T, length)


def _span_counts(
    T: int, prob: float, length: int, views: int, rng: np.random.Generator
) -> npt.NDArray[np.int64]:
    return np.floor(prob * T / length + rng.random(views)).astype(np.int64)


def _starts(counts: npt.NDArray[np.int64], among: int, rng: np.random.Generator) -> Mask:
    """Marks counts[m] distinct positions of `among` in row m, or all if there are not enough."""
    ranks = rng.random((len(counts), among)).argsort(axis=1).argsort(axis=1)
    return np.asarray(ranks < counts[:, None])


def _spread(starts: Mask, T: int, length: int) -> Mask:
    """The union of the spans that begin at `starts`, cut at T -> [M, T]."""
    mask = np.zeros((len(starts), T), dtype=bool)
    for k in range(min(length, T)):
        end = min(starts.shape[1], T - k)
        mask[:, k : k + end] |= starts[:, :end]
    return mask


# ------------------------------------------------------------------------------------------ blocks


def block_count(T: int, *, prob: float, inverse: bool) -> int:
    """Masked tokens per view of block_mask_1d, and of block_mask_2d with T = h * w."""
    # In floating point as in the originals, so that the counts are equal.
    return T - int(T * (1 - prob)) if inverse else int(T * prob)


def block_mask_1d(
    T: int,
    *,
    prob: float,
    length: int,
    adjust: float,
    inverse: bool,
    views: int,
    rng: np.random.Generator,
) -> Mask:
    """Blocks of data2vec 2.0 speech -> [M, T], with exactly block_count masked tokens per view.

    Draws floor(T * (prob + adjust) / length) centres with replacement, masks blocks of `length`
    around them, clipped at the edges, and then masks or unmasks single tokens up to the exact
    count. inverse: draws the visible tokens in this way (fairseq compute_block_mask_1d).
    """
    share = 1 - prob if inverse else prob
    centres = rng.integers(T, size=(views, int(T * ((share + adjust) / length)), 1))
    positions = (centres + _around(length)).clip(0, T - 1)
    mask = np.zeros((views, T), dtype=bool)
    mask[np.arange(views)[:, None, None], positions] = True
    mask = _repair(mask, int(T * share), rng)
    return ~mask if inverse else mask


def block_mask_2d(
    grid: tuple[int, int],
    *,
    prob: float,
    length: int,
    adjust: float,
    inverse: bool,
    views: int,
    rng: np.random.Generator,
) -> Mask:
    """Squares of data2vec 2.0 vision -> [M, h * w], with exactly block_count masked patches per
    view.

    Like block_mask_1d, with floor(h * w * (prob + adjust) / length^2) squares of length x length.
    The released recipes use inverse=True (fairseq compute_block_mask_2d).
    """
    h, w = grid
    T = h * w
    share = 1 - prob if inverse else prob
    centres = rng.integers(T, size=(views, int(T * ((share + adjust) / length**2)), 1, 1))
    rows = (centres // w + _around(length)[:, None]).clip(0, h - 1)
    columns = (centres % w + _around(length)).clip(0, w - 1)
    mask = np.zeros((views, h, w), dtype=bool)
    mask[np.arange(views)[:, None, None, None], rows, columns] = True
    mask = _repair(mask.reshape(views, T), int(T * share), rng)
    return ~mask if inverse else mask


def _around(length: int) -> npt.NDArray[np.int64]:
    return np.arange(length) - length // 2


def _repair(mask: Mask, count: int, rng: np.random.Generator) -> Mask:
    """Masks or unmasks random single tokens so that every row of mask [M, T] has `count`."""
    T = mask.shape[1]
    repaired = np.zeros_like(mask)
    if count:
        # Masked tokens rank above the others, and equals are ranked at random. The top `count` are
        # a random subset of the masked tokens, or all of them and a random subset of the others.
        score = mask + rng.random(mask.shape)
        np.put_along_axis(
            repaired, score.argpartition(T - count, axis=1)[:, T - count :], True, axis=1
        )
    return repaired


def beit_mask(
    grid: tuple[int, int],
    *,
    target: int,
    min_area: int = 16,
    max_area: int | None = None,
    aspect: float = 0.3,
    views: int,
    rng: np.random.Generator,
) -> Mask:
    """BEiT's blocks of data2vec 1.0 vision -> [M, h * w], with up to `target` masked patches per
    view.

    Draws blocks with an area uniform in [min_area, patches left to mask (at most max_area)] and an
    aspect ratio log-uniform in [aspect, 1 / aspect], until the target is reached or ten attempts to
    place a block fail. The number therefore varies (data2vec_vision beit/masking_generator.py).
    """
    mask = np.zeros((views, *grid), dtype=bool)
    for view in mask:
        left = target
        while left > 0:
            added = _add_beit_block(view, min_area, min(left, max_area or left), aspect, rng)
            if not added:
                break
            left -= added
    return mask.reshape(views, -1)


def _add_beit_block(
    mask: Mask, min_area: int, max_area: int, aspect: float, rng: np.random.Generator
) -> int:
    """Masks one more block in mask [h, w]. Returns the number of added patches, 0 if none fits."""
    for _ in range(ATTEMPTS):
        # If less than min_area is left, the area is between the two, as in the original.
        area = min_area + (max_area - min_area) * rng.random()
        ratio = math.exp((2 * rng.random() - 1) * math.log(aspect))
        h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if h >= mask.shape[0] or w >= mask.shape[1]:
            continue
        top = int(rng.integers(mask.shape[0] - h + 1))
        left = int(rng.integers(mask.shape[1] - w + 1))
        block = mask[top : top + h, left : left + w]
        added = block.size - int(block.sum())
        if 0 < added <= max_area:
            block[:] = True
            return added
    return 0


# -------------------------------------------------------------------------------------------- text


def uniform_count(T: int, *, prob: float) -> int:
    """Masked tokens per view of uniform_mask."""
    return T - int(T * (1 - prob))


def uniform_mask(T: int, *, prob: float, views: int, rng: np.random.Generator) -> Mask:
    """Single tokens of data2vec 2.0 text -> [M, T], with exactly uniform_count masked tokens per
    view.

    int(T * (1 - prob)) random tokens stay visible (random_masking in fairseq
    examples/data2vec/models/modalities/base.py).
    """
    return _repair(np.zeros((views, T), dtype=bool), uniform_count(T, prob=prob), rng)


def corrupt_tokens(
    tokens: Tokens,
    mask: Mask,
    *,
    mask_id: int,
    vocabulary: Tokens,
    random_prob: float,
    keep_prob: float,
    rng: np.random.Generator,
) -> Tokens:
    """The ids that the student of data2vec 1.0 text reads instead of `tokens`. tokens, mask and the
    result [..., T].

    A fraction random_prob of the masked tokens becomes a random id of `vocabulary`, a fraction
    keep_prob is unchanged, and the others become mask_id. 0.1 and 0.1 give BERT's 80/10/10; the
    released recipe has 0 and 0 (fairseq data/mask_tokens_dataset.py).
    """
    chance = rng.random(tokens.shape)
    corrupted = np.where(mask & (chance >= random_prob + keep_prob), mask_id, tokens)
    replaced = mask & (chance < random_prob)
    return np.where(replaced, rng.choice(vocabulary, tokens.shape), corrupted)
