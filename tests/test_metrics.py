"""Metrics: sums against plain numpy, rows and events across a resume, the picture."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_accumulator import (
    EventAccumulator as ServedEvents,  # what TensorBoard itself serves
)
from torch import Tensor

from d2v_ds.run.run_folder import RunFolder
from d2v_ds.telemetry.metrics import (
    TAGS,
    Accumulator,
    MetricsWriter,
    effective_rank,
    masked_picture,
    summarize,
    tag_of,
)

D = 6


def stats(
    prediction: Tensor, target: Tensor, samples: int = 2, placed: Tensor | None = None
) -> dict[str, Tensor]:
    """What the model reports of one micro-batch: fp32 sums. prediction, target: [N, D]; placed:
    targets of all samples at some places [B, P, D], by default the first N of which each sample
    has one."""
    error = (prediction - target).pow(2).sum()
    placed = target[:, None] if placed is None else placed
    return {
        "loss": error / 1000,
        "masked": torch.tensor(float(len(target))),
        "tokens": torch.tensor(2.0 * len(target)),
        "error": error,
        "target_sum": target.sum(0),
        "target_sq": target.pow(2).sum(0),
        "prediction_sum": prediction.sum(0),
        "prediction_sq": prediction.pow(2).sum(0),
        "front_std": torch.tensor(0.25 * samples),
        "samples": torch.tensor(float(samples)),
        "sampled": torch.tensor(float(len(target))),
        "sampled_sum": target.sum(0),
        "sampled_products": target.T @ target,
        "placed": torch.full((placed.shape[1],), float(len(placed))),
        "placed_sum": placed.sum(0),
        "placed_sq": placed.pow(2).sum(0),
    }


def spread(values: np.ndarray) -> float:
    return float(np.sqrt(values.var(axis=0, ddof=1) + 1e-6).mean())


def written_out_rank(vectors: np.ndarray) -> float:
    """Of [N, D]: by singular values, a share at a time."""
    squares = np.linalg.svd(vectors - vectors.mean(0), compute_uv=False) ** 2
    entropy = 0.0
    for square in squares:
        share = square / squares.sum()
        entropy -= share * math.log(share) if share > 0 else 0.0
    return math.exp(entropy)


def test_summary_equals_numpy_on_all_vectors() -> None:
    torch.manual_seed(0)
    accumulator = Accumulator()
    predictions, targets = [], []
    for count in (5, 1, 40, 13):
        target = torch.randn(count, D) * torch.arange(1, D + 1)
        prediction = 0.7 * target + 0.1 * torch.randn(count, D)
        accumulator.add(stats(prediction, target))
        predictions.append(prediction.numpy().astype(np.float64))
        targets.append(target.numpy().astype(np.float64))
    p, y = np.concatenate(predictions), np.concatenate(targets)
    summary = summarize(accumulator.reduce(), steps=2)
    error = ((p - y) ** 2).sum()
    expected = {
        "loss": error / 1000 / 2,
        "target_spread": spread(y),
        "prediction_spread": spread(p),
        "target_sample_spread": spread(y),
        "front_end_spread": 0.25,
        "explained_share": 1 - error / ((y - y.mean(0)) ** 2).sum(),
        "masked_share": 0.5,
    }
    rank = written_out_rank(y)
    assert summary.pop("target_rank") == pytest.approx(rank, rel=1e-4)  # eigenvalues are in fp32
    assert summary == pytest.approx(expected, rel=1e-6)
    assert {*summary, "target_rank"} <= set(TAGS)
    assert accumulator.reduce() == {}


@pytest.mark.parametrize(("mean", "tolerance"), [(0.0, 1e-6), (3.0, 1e-5), (30.0, 1e-3)])
def test_spread_of_a_million_tokens_away_from_zero(mean: float, tolerance: float) -> None:
    torch.manual_seed(1)
    accumulator, seen = Accumulator(), []
    plain: dict[str, Tensor] = {}  # what fp32 totals would have been
    for _ in range(250):
        target = mean + 0.1 * torch.randn(4000, D)
        reported = stats(target, target)
        accumulator.add(reported)
        plain = {name: plain.get(name, 0) + value for name, value in reported.items()}
        seen.append(target.numpy())
    expected = spread(np.concatenate(seen).astype(np.float64))
    summary = summarize(accumulator.reduce())
    assert summary["target_spread"] == pytest.approx(expected, rel=tolerance)
    assert summary["explained_share"] == 1
    if mean == 30:
        lost = summarize({name: value.numpy() for name, value in plain.items()})
        assert lost["target_spread"] != pytest.approx(expected, rel=0.01)


def test_a_collapsed_target_has_almost_no_spread() -> None:
    accumulator = Accumulator()
    constant = torch.full((100, D), 0.3)
    accumulator.add(stats(constant, constant))
    assert summarize(accumulator.reduce())["target_spread"] == pytest.approx(1e-3, rel=1e-2)


def test_targets_that_tell_places_apart_and_no_samples_have_no_spread_between_these() -> None:
    """Their spread as a whole and the share that is explained look as those of a good run."""
    torch.manual_seed(0)
    places = torch.randn(8, D)
    accumulator = Accumulator()
    for _ in range(5):  # micro-batches of one sample
        collapsed = places + 0.01 * torch.randn(8, D)
        accumulator.add(stats(0.9 * collapsed, collapsed, placed=collapsed[None]))
    summary = summarize(accumulator.reduce())
    assert summary["target_spread"] > 0.5 and summary["explained_share"] > 0.9
    assert summary["target_sample_spread"] == pytest.approx(0.01, rel=0.3)


def test_a_single_sample_has_no_spread_between_samples() -> None:
    accumulator = Accumulator()
    target = torch.randn(4, D)
    accumulator.add(stats(target, target, placed=target[None]))
    assert math.isnan(summarize(accumulator.reduce())["target_sample_spread"])


def test_effective_rank() -> None:
    rng = np.random.default_rng(0)
    for rank in (1, 3, D):
        vectors = rng.standard_normal((5000, rank)) @ np.eye(rank, D) + 4.0
        found = effective_rank(vectors.T @ vectors, vectors.sum(0), len(vectors))
        assert found == pytest.approx(rank, rel=1e-2)
    nothing = np.zeros((D, D))
    assert math.isnan(effective_rank(nothing, nothing[0], 10))
    assert math.isnan(effective_rank(nothing, nothing[0], 1))
    assert math.isnan(effective_rank(nothing * math.nan, nothing[0], 10))


def test_nothing_masked_is_not_a_number() -> None:
    accumulator = Accumulator()
    accumulator.add(stats(torch.zeros(0, D), torch.zeros(0, D)))
    summary = summarize(accumulator.reduce())
    assert summary["front_end_spread"] == 0.25 and summary["loss"] == 0
    for name in ("target_spread", "prediction_spread", "explained_share", "masked_share"):
        assert math.isnan(summary[name]), name


def test_add_keeps_its_own_copy_and_no_graph() -> None:
    accumulator = Accumulator()
    value = torch.ones(3, dtype=torch.float64, requires_grad=True)
    accumulator.add({"a": value})
    with torch.no_grad():
        value.zero_()
    accumulator.add({"a": torch.ones(3)})
    assert accumulator.reduce()["a"].tolist() == [2, 2, 2]


def test_reports_must_keep_their_layout() -> None:
    accumulator = Accumulator()
    accumulator.add({"a": torch.ones(3)})
    with pytest.raises(AssertionError, match="the model reported"):
        accumulator.add({"b": torch.ones(3)})


def reduce_on_rank(same: bool) -> float:
    rank = torch.distributed.get_rank()
    accumulator = Accumulator()
    for _ in range(rank + 1):
        accumulator.add(
            {"a": torch.full((2,), 10.0**rank), "b" if same or rank else "c": torch.ones(())}
        )
    sums = accumulator.reduce()
    assert sums["b"] == 3
    return float(sums["a"].sum())


def test_sums_are_those_of_all_ranks(run_ranks: Callable[..., list[float]]) -> None:
    assert run_ranks(2, reduce_on_rank, True) == [42, 42]


def test_ranks_that_report_different_stats_are_an_error(
    run_ranks: Callable[..., list[float]],
) -> None:
    with pytest.raises(AssertionError, match="ranks report different stats"):
        run_ranks(2, reduce_on_rank, False)


# ------------------------------------------------------------------------------------ writing


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


def rows(run: RunFolder) -> list[dict[str, float]]:
    return [json.loads(line) for line in run.metrics.read_text().splitlines()]


def events(run: RunFolder) -> EventAccumulator:
    accumulator = EventAccumulator(str(run.tensorboard))
    accumulator.Reload()
    return accumulator


def test_rows_and_events_go_on_where_the_run_does(run: RunFolder) -> None:
    with MetricsWriter(run) as writer:
        writer.text("config", "run:\n  steps: 40", 0)
        for step in (10, 20, 30):
            writer.scalars(step, 8 * step, {"loss": step / 10, "loss/speech": 1.0})
        for step in (20, 30):
            writer.image("input/masked", np.full((4, 5, 3), step, np.uint8), step)
    with run.metrics.open("a") as file:
        file.write('{"step": 40, "samp')  # killed in the middle of a row
    with MetricsWriter(run, step=20) as writer:
        for step in (30, 40):
            writer.scalars(step, 8 * step, {"loss": step / 100, "loss/speech": 2.0})
    assert [(r["step"], r["samples"], r["loss"]) for r in rows(run)] == [
        (10, 80, 1.0),
        (20, 160, 2.0),
        (30, 240, 0.3),
        (40, 320, 0.4),
    ]
    read = events(run)
    curve = [(e.step, e.value) for e in read.Scalars("loss/total")]
    assert [step for step, _ in curve] == [10, 20, 30, 40]
    assert [value for _, value in curve] == pytest.approx([1.0, 2.0, 0.3, 0.4])
    assert [e.value for e in read.Scalars("loss/speech")] == [1, 1, 2, 2]
    assert [e.step for e in read.Images("input/masked")] == [20]
    assert (
        b"    run:\n      steps: 40"
        in read.Tensors("config/text_summary")[0].tensor_proto.string_val[0]
    )


def test_a_start_from_nothing_takes_everything_back(run: RunFolder) -> None:
    for _ in range(2):
        with MetricsWriter(run) as writer:
            writer.text("config", "a", 0)
            writer.scalars(10, 80, {"loss": 1.0})
    assert [row["step"] for row in rows(run)] == [10]
    served = ServedEvents(str(run.tensorboard))
    served.Reload()
    assert len(served.Tensors("loss/total")) == 1
    assert len(served.Tensors("config/text_summary")) == 1


def test_every_cadence_is_on_disk_at_once(run: RunFolder) -> None:
    writer = MetricsWriter(run)
    writer.scalars(10, 80, {"loss": 1.0})
    assert len(rows(run)) == 1
    assert len(events(run).Scalars("loss/total")) == 1
    writer.close()


def test_what_is_not_finite_is_null_in_the_row(run: RunFolder) -> None:
    with MetricsWriter(run) as writer:
        writer.scalars(10, 80, {"loss": math.nan, "grad_norm": math.inf})
    (row,) = rows(run)
    assert row["loss"] is None and row["grad_norm"] is None
    assert math.isnan(events(run).Scalars("loss/total")[0].value)


def test_names_of_one_modality_have_tags_of_their_own() -> None:
    assert tag_of("loss") == "loss/total" and tag_of("loss/speech") == "loss/speech"
    assert tag_of("target_spread/text") == "repr/std_target/text"
    assert tag_of("epoch/speech/libri") == "data/epoch/speech/libri"


def test_names_without_a_tag_are_refused(run: RunFolder) -> None:
    with MetricsWriter(run) as writer, pytest.raises(AssertionError, match="'los' is not in TAGS"):
        writer.scalars(10, 80, {"los": 1.0})


# ----------------------------------------------------------------------------------- picture


def test_masked_picture_shades_the_masked_frames() -> None:
    log_mel = np.random.default_rng(0).normal(size=(101, 40)).astype(np.float32)
    mask = np.zeros(50, dtype=bool)
    mask[10:20] = True
    plain, picture = (
        masked_picture(log_mel, np.zeros(50, dtype=bool)),
        masked_picture(log_mel, mask),
    )
    assert picture.shape == (160, 404, 3) and picture.dtype == np.uint8
    changed = (plain != picture).any(axis=(0, 2)).reshape(101, 4).all(axis=1)  # by frame
    expected = np.array([mask[i * 50 // 101] for i in range(101)])
    assert (changed == expected).all()
    assert picture.reshape(160, 101, 4, 3)[:, expected].std() < plain.std() / 2


def test_masked_picture_has_low_frequencies_at_the_bottom_and_light_for_loud() -> None:
    log_mel = np.zeros((20, 10))
    log_mel[:, :2] = 5.0  # all the energy in the two lowest bands
    picture = masked_picture(log_mel, np.zeros(10, dtype=bool)).astype(int).sum(axis=2)
    assert picture[-1].min() > picture[0].max()


def test_masked_picture_of_silence() -> None:
    assert masked_picture(np.zeros((4, 3)), np.ones(2, dtype=bool)).shape == (12, 16, 3)
