"""Masks: pure functions of (shape, settings, generator) -> bool arrays, True where masked.

A modality's collate calls one of them for each sample with that sample's own generator, and
batch.mask_indices turns the result into indices. The counts that follow from the length alone have
functions too (`block_count`, `uniform_count`), so that the loader knows them without drawing; span
and BEiT masks have none, their counts are drawn. The originals are named beside each; they are in
fairseq/data/data_utils.py where nothing else is said.

M masked views, T tokens, [h, w] a grid of h * w patches.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Mask = npt.NDArray[np.bool_]
Tokens = npt.NDArray[np.int64]

ATTEMPTS = 10  # of BEiT's generator to place one block


# ------------------------------------------------------------------------------------------- spans


def span_mask(T: int, *, prob: float, length: int, views: int, rng: np.random.Generator) -> Mask:
    """Spans of data2vec 1.0 speech -> [M, T]; the count varies from view to view.

    floor(prob * T / length + u) spans, at least one, whose starts are drawn without replacement
    from [0, T - length), so that the last token is never masked (fairseq compute_mask_indices). Its
    trimming of a batch to the smallest count is not done. A span is at most T - 1 long, so one
    token at least stays visible, and T = 1 is not masked at all.
    """
    if T == 1:
        return np.zeros((views, 1), dtype=bool)
    length = min(length, T - 1)
    counts = np.maximum(1, _span_counts(T, prob, length, views, rng))
    return _spread(_starts(counts, T - length, rng), T, length)


def token_span_mask(
    T: int, *, prob: float, length: int, views: int, rng: np.random.Generator
) -> Mask:
    """Spans of data2vec 1.0 text -> [M, T]; the count varies from view to view and may be 0.

    floor(prob * T / length + u) spans, whose starts are drawn without replacement from [0, T); what
    goes beyond the end is cut (fairseq data/mask_tokens_dataset.py).
    """
    counts = _span_counts(T, prob, length, views, rng)
    return _spread(_starts(counts, T, rng), T, length)


def _span_counts(
    T: int, prob: float, length: int, views: int, rng: np.random.Generator
) -> npt.NDArray[np.int64]:
    return np.floor(prob * T / length + rng.random(views)).astype(np.int64)


def _starts(counts: npt.NDArray[np.int64], among: int, rng: np.random.Generator) -> Mask:
    """counts[m] distinct places of `among` in row m (all, where there are not enough)."""
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
    """Masked tokens in each view of block_mask_1d, and of block_mask_2d with T = h * w."""
    # In floating point as the references do it, so that counts agree to the token.
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
    """Blocks of data2vec 2.0 speech -> [M, T], in every view exactly block_count tokens.

    Blocks of `length` around floor(T * (prob + adjust) / length) centres drawn with replacement,
    pushed in from the edges, then repaired to the exact count with single tokens. inverse: the same
    for what stays visible (fairseq compute_block_mask_1d).
    """
    share = 1 - prob if inverse else prob
    centres = rng.integers(T, size=(views, int(T * ((share + adjust) / length)), 1))
    places = (centres + _around(length)).clip(0, T - 1)
    mask = np.zeros((views, T), dtype=bool)
    mask[np.arange(views)[:, None, None], places] = True
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
    """Squares of data2vec 2.0 vision -> [M, h * w], in every view exactly block_count patches.

    As block_mask_1d with floor(h * w * (prob + adjust) / length^2) squares of length x length; the
    released recipes use inverse=True (fairseq compute_block_mask_2d).
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
    """Random single tokens masked or unmasked until every row of [M, T] has `count`."""
    T = mask.shape[1]
    repaired = np.zeros_like(mask)
    if count:
        # Masked tokens outrank the others, chance decides among equals: the top `count` are a
        # random part of the masked ones, or all of them and a random part of the rest.
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
    """BEiT's blocks of data2vec 1.0 vision -> [M, h * w]; up to `target` patches in each view.

    Blocks of an area uniform in [min_area, what is left to mask (at most max_area)] and an aspect
    ratio log-uniform in [aspect, 1 / aspect], until the target is met or ten attempts at one block
    fail; so the count varies (data2vec_vision beit/masking_generator.py).
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
    """Masks one more block in mask [h, w]; returns the patches added, 0 where none fits."""
    for _ in range(ATTEMPTS):
        # When less than min_area is left, the area lies between the two: as in the original.
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
    """Masked tokens in each view of uniform_mask."""
    return T - int(T * (1 - prob))


def uniform_mask(T: int, *, prob: float, views: int, rng: np.random.Generator) -> Mask:
    """Single tokens of data2vec 2.0 text -> [M, T], in every view exactly uniform_count of them.

    int(T * (1 - prob)) random tokens stay visible (random_masking of fairseq
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
    """What the student of data2vec 1.0 text reads in place of `tokens`; both and `mask` [..., T].

    Of the masked tokens a share random_prob becomes a random id of `vocabulary`, a share keep_prob
    stays, the others become mask_id: BERT's 80/10/10 with 0.1 and 0.1, the released recipe with 0
    and 0 (fairseq data/mask_tokens_dataset.py).
    """
    chance = rng.random(tokens.shape)
    corrupted = np.where(mask & (chance >= random_prob + keep_prob), mask_id, tokens)
    replaced = mask & (chance < random_prob)
    return np.where(replaced, rng.choice(vocabulary, tokens.shape), corrupted)
