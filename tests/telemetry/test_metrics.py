"""Metrics: sums over micro-batches and ranks, and rows and events across a resume."""

from __future__ import annotations

import json
import logging
import math
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_accumulator import (
    EventAccumulator as ServedEvents,  # what TensorBoard itself displays
)

from d2v_ds.pretrain_report import PretrainReport
from d2v_ds.records import last_row, metrics_rows
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


def test_a_step_that_is_not_finite_is_left_out_and_counted() -> None:
    accumulator, step = Accumulator(), Accumulator()
    for value in (1.0, math.nan, 3.0, math.inf):
        for part in (value, 1.0):  # two micro-batches
            step.add({"a": torch.tensor([part, 2.0])})
        accumulator.take(step)
    accumulator.take(step)  # has nothing
    assert accumulator.reduce()["a"].tolist() == [1 + 1 + 3 + 1, 8]
    assert accumulator.covered == 2 and accumulator.reduce() == {}


def take_on_rank() -> tuple[float, float]:
    rank = torch.distributed.get_rank()
    accumulator, step = Accumulator(), Accumulator()
    for number in range(4):
        step.add({"a": torch.tensor(math.nan if number == rank else 1.0)})
        accumulator.take(step)
    return float(accumulator.reduce()["a"]), accumulator.covered


def test_what_is_left_out_is_a_mean_over_the_ranks(run_ranks: Callable[..., list[Any]]) -> None:
    assert run_ranks(2, take_on_rank) == [(6.0, 3.0)] * 2


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


# ---------------------------------------------------------------------------- damage and trouble

ROW = b'{"step": 10, "loss": 1.0}'
DAMAGED = (
    *(b"", b"\0" * 70_000, b"\xff\xfe{", b"[1, 2]", b'{"loss": 1}', b'{"step": "3"}'),
    *(b'{"step": true}', b'{"step": -1}', b'{"step": 1e3}', b"[" * 9999, b'{"step": 5, "lo'),
)


@pytest.mark.parametrize("damaged", DAMAGED)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_damaged_row_blocks_nothing_and_is_kept(
    damaged: bytes, place: int, run: RunFolder, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(logging.getLogger("d2v_ds"), "propagate", True)
    lines = [ROW, b'{"step": 30}']
    lines.insert(place, damaged)
    run.root.mkdir()
    run.metrics.write_bytes(b"\n".join(lines) + b"\n")
    with MetricsWriter(run, PretrainReport.tags, step=20) as writer:
        writer.scalars(30, 240, {"loss": 2.0})
    assert [row["step"] for row in rows(run)] == [10, 30] and rows(run)[0]["loss"] == 1.0
    assert (run.root / "metrics.jsonl.damaged").read_bytes() == damaged + b"\n"
    assert "1 damaged lines were moved to metrics.jsonl.damaged" in caplog.text
    assert last_row(run.metrics) == rows(run)[-1] and metrics_rows(run.metrics) == rows(run)


def test_rows_after_a_later_step_are_kept(run: RunFolder) -> None:
    """An evaluation of an earlier checkpoint is recorded after the rows of later steps."""
    run.root.mkdir()
    run.metrics.write_text('{"step": 10}\n{"step": 30}\n{"step": 10, "evaluation": "knn"}')
    MetricsWriter(run, PretrainReport.tags, step=20).close()
    assert run.metrics.read_text() == '{"step": 10}\n{"step": 10, "evaluation": "knn"}\n'


def test_the_last_row_is_found_behind_much_damage(run: RunFolder) -> None:
    run.root.mkdir()
    run.metrics.write_bytes(ROW + b"\n" + b"\0" * 300_000 + b"\n")
    assert last_row(run.metrics) == {"step": 10, "loss": 1.0}


def test_a_full_disk_costs_rows_and_is_told_twice(
    run: RunFolder, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit of the size of a file stands for a disk without space."""
    monkeypatch.setattr(logging.getLogger("d2v_ds"), "propagate", True)
    writer = MetricsWriter(run, PretrainReport.tags)
    writer.scalars(10, 80, {"loss": 1.0})
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        size = run.metrics.stat().st_size + 20  # a part of the next row
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))
        for step in (20, 30):
            writer.scalars(step, 8 * step, {"loss": 1.0})
        assert len(rows(run)) == 1, "a part of a row stays"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, before)
    writer.scalars(40, 320, {"loss": 1.0})
    writer.close()
    assert [row["step"] for row in rows(run)] == [10, 40]
    assert [e.step for e in events(run).Scalars("loss/total")] == [10, 40]
    assert writer.losses.total == 2
    told = [line for line in caplog.messages if str(run.metrics) in line]
    assert len(told) == 2 and "training continues without these rows" in told[0]
    assert "can be written again; 2 rows were lost" in told[1]


def test_curves_of_a_clock_that_was_set_back(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorBoard reads files in the order of their names, which begin with a time."""
    for now, first in ((2e9, 0), (1e9, 2)):
        monkeypatch.setattr("d2v_ds.telemetry.events.time.time", lambda now=now: now)
        with MetricsWriter(run, PretrainReport.tags, step=first) as writer:
            for step in range(first + 1, 5):
                writer.scalars(step, step, {"loss": first + step})
    times = [row["time"] for row in rows(run)]
    assert times == sorted(times) and times[0] == 2e9
    served = ServedEvents(str(run.tensorboard))
    served.Reload()
    shown = served.Tensors("loss/total")
    assert [event.step for event in shown] == [1, 2, 3, 4]
    assert [event.wall_time for event in shown] == sorted(event.wall_time for event in shown)
    last = events(run).Scalars("loss/total")[-1]
    assert (last.step, last.value) == (4, 6.0)
