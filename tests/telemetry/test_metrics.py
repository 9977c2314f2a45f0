"""Metrics: sums over micro-batches and ranks, and rows and events across a resume."""

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
    EventAccumulator as ServedEvents,  # what TensorBoard itself displays
)

from d2v_ds.pretrain_report import PretrainReport
from d2v_ds.run.run_folder import RunFolder
from d2v_ds.telemetry.metrics import TAGS, Accumulator, MetricsWriter, tag_of


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
    with pytest.raises(AssertionError, match="the task reported"):
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


def test_sums_are_over_all_ranks(run_ranks: Callable[..., list[float]]) -> None:
    assert run_ranks(2, reduce_on_rank, True) == [42, 42]


def test_ranks_that_report_different_stats_are_an_error(
    run_ranks: Callable[..., list[float]],
) -> None:
    with pytest.raises(AssertionError, match="ranks report different sums"):
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


def test_rows_and_events_resume_at_the_step_of_the_run(run: RunFolder) -> None:
    with MetricsWriter(run, PretrainReport.tags) as writer:
        writer.text("config", "run:\n  steps: 40", 0)
        for step in (10, 20, 30):
            writer.scalars(step, 8 * step, {"loss": step / 10, "loss/speech": 1.0})
        for step in (20, 30):
            writer.image("input/masked", np.full((4, 5, 3), step, np.uint8), step)
    with run.metrics.open("a") as file:
        file.write('{"step": 40, "samp')  # killed while writing a row
    with MetricsWriter(run, PretrainReport.tags, step=20) as writer:
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


def test_a_start_from_scratch_removes_earlier_metrics(run: RunFolder) -> None:
    for _ in range(2):
        with MetricsWriter(run, PretrainReport.tags) as writer:
            writer.text("config", "a", 0)
            writer.scalars(10, 80, {"loss": 1.0})
    assert [row["step"] for row in rows(run)] == [10]
    served = ServedEvents(str(run.tensorboard))
    served.Reload()
    assert len(served.Tensors("loss/total")) == 1
    assert len(served.Tensors("config/text_summary")) == 1


def test_metrics_are_on_disk_immediately(run: RunFolder) -> None:
    writer = MetricsWriter(run, PretrainReport.tags)
    writer.scalars(10, 80, {"loss": 1.0})
    assert len(rows(run)) == 1
    assert len(events(run).Scalars("loss/total")) == 1
    writer.close()


def test_non_finite_values_are_null_in_the_row(run: RunFolder) -> None:
    with MetricsWriter(run, PretrainReport.tags) as writer:
        writer.scalars(10, 80, {"loss": math.nan, "grad_norm": math.inf})
    (row,) = rows(run)
    assert row["loss"] is None and row["grad_norm"] is None
    assert math.isnan(events(run).Scalars("loss/total")[0].value)


def test_names_of_one_modality_have_their_own_tags() -> None:
    def tag(name: str) -> str:
        return tag_of(name, {**TAGS, **PretrainReport.tags})

    assert tag("loss") == "loss/total" and tag("loss/speech") == "loss/speech"
    assert tag("target_spread/text") == "repr/std_target/text"
    assert tag("epoch/speech/libri") == "data/epoch/speech/libri"


def test_names_without_a_tag_are_refused(run: RunFolder) -> None:
    with (
        MetricsWriter(run, PretrainReport.tags) as writer,
        pytest.raises(AssertionError, match="'los' has no TensorBoard tag"),
    ):
        writer.scalars(10, 80, {"los": 1.0})
