"""Masks: the statistics of the original generators, exact counts, and edge cases."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2v_ds import masking, seeding
from d2v_ds.masking import Mask

GOLDEN = Path(__file__).parent / "golden"
STATISTICS = json.loads((GOLDEN / "masks.json").read_text())
ROWS = 2000  # rows drawn per key; the golden numbers come from a similar number
CHUNKS = 40
SIGMAS = 4.5
HISTOGRAM = 65  # bins by length of a run; the last one counts 64 and more

Draw = Callable[[int, np.random.Generator], Mask]


def rng(*path: int) -> np.random.Generator:
    return seeding.generator(0, *path)


# ------------------------------------------------------------------------------ golden statistics


def block_1d(T: int, prob: float, adjust: float) -> Draw:
    return lambda views, r: masking.block_mask_1d(
        T, prob=prob, length=5, adjust=adjust, inverse=False, views=views, rng=r
    )


def block_2d(side: int, prob: float, adjust: float, inverse: bool = True) -> Draw:
    return lambda views, r: masking.block_mask_2d(
        (side, side), prob=prob, length=3, adjust=adjust, inverse=inverse, views=views, rng=r
    )


def spans(T: int, prob: float, length: int, padded: int = 0) -> Draw:
    def draw(views: int, r: np.random.Generator) -> Mask:
        mask = masking.span_mask(T, prob=prob, length=length, views=views, rng=r)
        return np.pad(mask, ((0, 0), (0, padded)))

    return draw


def trimmed(draw: Draw, batch: int) -> Draw:
    """Cuts every row of a batch to the smallest count by unmasking single tokens. fairseq does this
    after drawing and we do not, so its statistics can only be compared with trimmed masks."""

    def cut(views: int, r: np.random.Generator) -> Mask:
        mask = draw(views, r)
        for rows in np.split(mask, views // batch):
            fewest = rows.sum(1).min()
            for row in rows:
                masked = np.flatnonzero(row)
                row[r.choice(masked, len(masked) - fewest, replace=False)] = False
        return mask

    return cut


def token_spans(T: int) -> Draw:
    return lambda views, r: masking.token_span_mask(T, prob=0.35, length=4, views=views, rng=r)


def uniform(prob: float) -> Draw:
    return lambda views, r: masking.uniform_mask(512, prob=prob, views=views, rng=r)


def beit(target: int, max_area: int | None) -> Draw:
    return lambda views, r: masking.beit_mask(
        (14, 14), target=target, min_area=16, max_area=max_area, views=views, rng=r
    )


DRAWS: dict[str, Draw] = {
    "v1_audio_p0.65_l10_B1_T99": spans(99, 0.65, 10),
    "v1_audio_p0.65_l10_B1_T399": spans(399, 0.65, 10),
    "v1_audio_p0.65_l10_B1_T499": spans(499, 0.65, 10),
    "v1_audio_p0.65_l10_B8_T399": trimmed(spans(399, 0.65, 10), 8),
    "v1_audio_p0.65_l10_B1_T399_valid300": spans(300, 0.65, 10, padded=99),
    "v2_audio_base_block1d_p0.5_adj0.05_l5_T399": block_1d(399, 0.5, 0.05),
    "v2_audio_base_block1d_p0.5_adj0.05_l5_T99": block_1d(99, 0.5, 0.05),
    "v2_audio_large_block1d_p0.55_adj0.1_l5_T399": block_1d(399, 0.55, 0.1),
    "v2_audio_large_block1d_p0.55_adj0.1_l5_T99": block_1d(99, 0.55, 0.1),
    "v2_audio_inmodel_p0.5_l5_B8_T399": trimmed(spans(399, 0.5, 5), 8),
    "v2_image_base_inverse_p0.8_adj0.07_l3_d14": block_2d(14, 0.8, 0.07),
    "v2_image_large_huge_inverse_p0.75_adj0.1_l3_d14": block_2d(14, 0.75, 0.1),
    "v2_image_huge14_inverse_p0.75_adj0.1_l3_d16": block_2d(16, 0.75, 0.1),
    "v2_image_noninverse_p0.8_adj0.07_l3_d14": block_2d(14, 0.8, 0.07, inverse=False),
    "v1_vision_beit_n120_min16_max196": beit(120, 196),
    "v1_vision_beit_n75_min16_maxNone": beit(75, None),
    "v1_text_p0.35_l4_T512": token_spans(512),
    "v1_text_p0.35_l4_T128": token_spans(128),
    "v2_text_random_p0.48_T512": uniform(0.48),
    "v2_text_random_p0.5_T512": uniform(0.5),
}


def run_lengths(mask: Mask) -> npt.NDArray[np.int64]:
    """Lengths of the runs of True over all rows of [rows, T]."""
    edges = np.diff(np.pad(mask.astype(np.int8), ((0, 0), (1, 1))), axis=1)
    return np.flatnonzero(edges == -1) - np.flatnonzero(edges == 1)


def component_sizes(mask: Mask) -> npt.NDArray[np.int64]:
    """Sizes of the 4-connected components of True over all images of [rows, h, w]."""
    label = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:
        around = np.pad(label, ((0, 0), (1, 1), (1, 1)))
        neighbours = [
            around[:, :-2, 1:-1],
            around[:, 2:, 1:-1],
            around[:, 1:-1, :-2],
            around[:, 1:-1, 2:],
        ]
        spread = np.where(mask, np.maximum.reduce([label, *neighbours]), 0)
        if np.array_equal(spread, label):
            return np.unique(label[mask], return_counts=True)[1]
        label = spread


def statistics_1d(mask: Mask, valid: int) -> dict[str, float]:
    masked, unmasked = run_lengths(mask), run_lengths(~mask)
    return {
        "frac_mean": mask.sum(1).mean() / valid,
        "frac_std": (mask.sum(1) / valid).std(),
        "masked_span_len_mean": masked.mean(),
        "masked_span_len_std": masked.std(),
        "masked_spans_per_row": len(masked) / len(mask),
        "unmasked_span_len_mean": unmasked.mean(),
        "pair_both_masked": (mask[:, 1:] & mask[:, :-1]).mean(),
        "first_pos_prob": mask[:, 0].mean(),
        "last_pos_prob": mask[:, -1].mean(),
    }


def statistics_2d(mask: Mask) -> dict[str, float]:
    masked, kept = component_sizes(mask), component_sizes(~mask)
    return {
        "frac_mean": mask.mean(),
        "frac_std": mask.mean((1, 2)).std(),
        "neighbour_equal_h": (mask[:, :, 1:] == mask[:, :, :-1]).mean(),
        "neighbour_equal_v": (mask[:, 1:] == mask[:, :-1]).mean(),
        "masked_components_per_image": len(masked) / len(mask),
        "masked_component_size_mean": masked.mean(),
        "kept_components_per_image": len(kept) / len(mask),
        "kept_component_size_mean": kept.mean(),
    }


@pytest.fixture(scope="module")
def golden() -> dict[str, npt.NDArray[np.generic]]:
    with np.load(GOLDEN / "masks.npz") as arrays:
        return dict(arrays)


def test_golden_masks_every_key_is_drawn() -> None:
    assert set(DRAWS) == set(STATISTICS)


@pytest.mark.parametrize("key", STATISTICS)
def test_golden_masks(key: str, golden: dict[str, npt.NDArray[np.generic]]) -> None:
    """Every statistic agrees with that of the original generator within the sampling error."""
    expected = STATISTICS[key]
    mask = DRAWS[key](ROWS, rng(list(STATISTICS).index(key)))
    valid = 300 if key.endswith("valid300") else mask.shape[1]
    if "grid" in expected:
        mask = mask.reshape(-1, expected["grid"], expected["grid"])

    def statistics(rows: Mask) -> dict[str, float]:
        return statistics_2d(rows) if rows.ndim == 3 else statistics_1d(rows, valid)

    found = statistics(mask)
    spread = [list(statistics(rows).values()) for rows in np.split(mask, CHUNKS)]
    error = np.std(spread, axis=0) / np.sqrt(CHUNKS)  # standard error of a mean over ROWS rows
    error = error * np.sqrt(1 + ROWS / expected["n"])
    assert set(found) <= set(expected)
    for (name, value), sigma in zip(found.items(), error, strict=True):
        assert abs(value - expected[name]) <= SIGMAS * sigma + 1e-9, f"{name}: {value}"

    share = mask.reshape(ROWS, -1).sum(1) / valid
    for q, value in expected["frac_q"].items():
        below, upto = np.mean(share < value - 1e-9), np.mean(share <= value + 1e-9)
        assert below - 0.05 <= float(q) <= upto + 0.05, f"quantile {q} of the share is {value}"

    probability = golden[f"{key}/pos_prob"].astype(float)
    mean = (probability + mask.mean(0)) / 2
    sigma = np.sqrt(mean * (1 - mean) * (1 / ROWS + 1 / expected["n"]))
    assert (np.abs(mask.mean(0) - probability) <= 5 * sigma + 1e-9).all(), "by position"
    _check_histograms(key, mask, golden, expected["n"])


def _check_histograms(
    key: str, mask: Mask, golden: dict[str, npt.NDArray[np.generic]], rows: int
) -> None:
    """Run lengths and component sizes: every share agrees within the sampling error of counts."""
    if mask.ndim == 2:
        sizes = {"span_hist": run_lengths(mask), "unmasked_span_hist": run_lengths(~mask)}
        most = HISTOGRAM - 1
    else:
        sizes = {
            "masked_component_hist": component_sizes(mask),
            "kept_component_hist": component_sizes(~mask),
        }
        most = mask[0].size
    for name, values in sizes.items():
        expected = golden[f"{key}/{name}"].astype(float)
        found = np.bincount(values.clip(max=most), minlength=len(expected)).astype(float)
        difference = found / ROWS - expected / rows
        # The counts of one length are nearly Poisson. Twice its deviation allows for the
        # correlation between the runs of a row.
        sigma = 2 * np.sqrt(found + expected + 1) * np.sqrt(1 / (ROWS * rows))
        worst = int(np.argmax(np.abs(difference) / sigma))
        assert abs(difference[worst]) <= 4 * sigma[worst], f"{name} at {worst}"


@pytest.mark.parametrize(
    "key", ["v1_audio_p0.65_l10_B1_T399", "v2_audio_base_block1d_p0.5_adj0.05_l5_T399"]
)
def test_golden_masks_test_can_fail(key: str, golden: dict[str, npt.NDArray[np.generic]]) -> None:
    """Run lengths distinguish a similar rule, pure spans with the same share."""
    T = mask_width = 399
    count = round(STATISTICS[key]["frac_mean"] * T)
    starts = rng(1).random((ROWS, mask_width)).argsort(1).argsort(1) < count // 5
    mask = masking._spread(starts, T, 5)
    with pytest.raises(AssertionError):
        _check_histograms(key, mask, golden, STATISTICS[key]["n"])


# ------------------------------------------------------------------------------------ exact counts


@given(
    T=st.integers(1, 300),
    prob=st.floats(0, 1),
    adjust=st.floats(0, 0.2),
    length=st.integers(1, 20),
    inverse=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_block_mask_1d_has_the_exact_count(
    T: int, prob: float, adjust: float, length: int, inverse: bool, seed: int
) -> None:
    mask = masking.block_mask_1d(
        T, prob=prob, length=length, adjust=adjust, inverse=inverse, views=3, rng=rng(seed)
    )
    assert mask.shape == (3, T) and mask.dtype == bool
    assert set(mask.sum(1)) == {masking.block_count(T, prob=prob, inverse=inverse)}


@pytest.mark.parametrize(
    ("side", "prob", "adjust", "masked"),
    [(14, 0.8, 0.07, 157), (14, 0.75, 0.1, 147), (16, 0.75, 0.1, 192)],
)
def test_block_mask_2d_has_the_published_counts(
    side: int, prob: float, adjust: float, masked: int
) -> None:
    mask = block_2d(side, prob, adjust)(50, rng())
    assert set(mask.sum(1)) == {masked}
    assert masking.block_count(side * side, prob=prob, inverse=True) == masked


def test_block_mask_2d_on_a_grid_that_is_not_square() -> None:
    mask = masking.block_mask_2d(
        (2, 9), prob=0.5, length=3, adjust=0.1, inverse=True, views=40, rng=rng()
    )
    assert mask.shape == (40, 18) and set(mask.sum(1)) == {9}


@pytest.mark.parametrize(("T", "prob", "masked"), [(64, 0.48, 31), (512, 0.48, 246), (1, 0.5, 1)])
def test_uniform_mask_has_the_published_counts(T: int, prob: float, masked: int) -> None:
    mask = masking.uniform_mask(T, prob=prob, views=5, rng=rng())
    assert set(mask.sum(1)) == {masked} and masking.uniform_count(T, prob=prob) == masked


def test_block_counts_published_for_speech() -> None:
    assert masking.block_count(749, prob=0.5, inverse=False) == 374
    assert masking.block_count(749, prob=0.55, inverse=False) == 411


@pytest.mark.parametrize("T", [1, 2, 3, 9, 10, 11, 12, 40])
def test_span_mask_leaves_one_token_and_masks_one(T: int) -> None:
    mask = masking.span_mask(T, prob=0.65, length=10, views=200, rng=rng())
    assert not mask[:, -1].any(), "the last token is never masked"
    assert mask.any(1).all() or T == 1
    assert not masking.span_mask(1, prob=0.65, length=10, views=2, rng=rng()).any()


def test_span_mask_without_probability_has_one_span() -> None:
    assert set(masking.span_mask(50, prob=0, length=10, views=30, rng=rng()).sum(1)) == {10}


def test_span_mask_uses_all_starts_if_more_are_requested() -> None:
    mask = masking.span_mask(12, prob=0.99, length=10, views=100, rng=rng())
    assert set(mask.sum(1)) <= {10, 11}


def test_token_span_mask_edges() -> None:
    assert not masking.token_span_mask(64, prob=0, length=4, views=9, rng=rng()).any()
    short = masking.token_span_mask(2, prob=1, length=4, views=200, rng=rng())
    assert set(short.sum(1)) == {0, 1, 2}  # floor(0.5 + u) spans, cut at the end
    assert masking.token_span_mask(64, prob=1, length=1, views=3, rng=rng()).all()


@pytest.mark.parametrize("target", [0, 1, 75, 120, 196])
def test_beit_mask_never_exceeds_the_target(target: int) -> None:
    counts = masking.beit_mask((14, 14), target=target, views=300, rng=rng()).sum(1)
    assert counts.max() <= target
    assert len(set(counts)) > 1 or target == 0, "the count varies"
    if target == 120:
        assert abs(counts.mean() - 119.5) < 0.3


# -------------------------------------------------------------------------------------------- text


def test_corrupt_tokens_80_10_10() -> None:
    tokens = np.full((200, 500), 7)
    mask = rng(1).random(tokens.shape) < 0.15
    corrupted = masking.corrupt_tokens(
        tokens,
        mask,
        mask_id=3,
        vocabulary=np.arange(100, 200),
        random_prob=0.1,
        keep_prob=0.1,
        rng=rng(2),
    )
    assert (corrupted[~mask] == 7).all()
    selected = corrupted[mask]
    shares = [np.mean(selected == 3), np.mean(selected == 7), np.mean(selected >= 100)]
    assert np.allclose(shares, [0.8, 0.1, 0.1], atol=4.5 * np.sqrt(0.16 / len(selected)))
    assert len(set(selected[selected >= 100])) == 100
    assert (tokens == 7).all(), "the input was changed"


def test_corrupt_tokens_of_the_released_recipe_masks_all() -> None:
    tokens, mask = np.arange(10, 20), np.arange(10) % 2 == 0
    corrupted = masking.corrupt_tokens(
        tokens, mask, mask_id=3, vocabulary=tokens, random_prob=0, keep_prob=0, rng=rng()
    )
    assert corrupted.tolist() == [3, 11, 3, 13, 3, 15, 3, 17, 3, 19]


# -------------------------------------------------------------------------------------- generators


def test_generator_is_pinned() -> None:
    """These numbers must never change, so that resumed runs and other machines draw the same
    masks."""
    assert seeding.bit_generator(1, 2, 3).random_raw(3).tolist() == PINNED
    assert seeding.generator(1, 2, 3).bit_generator.random_raw(3).tolist() == PINNED


PINNED = [4827935704109542691, 12433643860386191282, 12685302016869770481]


def test_generator_differs_with_every_part_of_the_path() -> None:
    paths = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0), (0, 0, 0, 0), (10, 0), (1, 0)]
    firsts = {int(seeding.bit_generator(*path).random_raw()) for path in paths}
    assert len(firsts) == len(paths)


def test_views_and_samples_get_different_masks() -> None:
    first = block_1d(200, 0.5, 0.05)(8, rng(0, 1))
    second = block_1d(200, 0.5, 0.05)(8, rng(0, 2))
    assert len({row.tobytes() for row in np.concatenate([first, second])}) == 16
    assert np.array_equal(first, block_1d(200, 0.5, 0.05)(8, rng(0, 1)))
