"""Telemetry: metrics per modality, warnings about collapse, and sums over ranks."""

from __future__ import annotations

import io
import json
import logging
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from d2v_ds import recipes
from d2v_ds.batch import StepBatch
from d2v_ds.pretrain import Pretrain
from d2v_ds.run.run_folder import RunFolder
from d2v_ds.run.watchdog import Watchdog
from d2v_ds.step import StepSettings
from d2v_ds.telemetry import Counts, Telemetry
from tests.engine.test_joint import batches_of
from tests.helpers import joint_sets

CURSOR = {name: {"epoch": i} for i, name in enumerate(("speech", "vision", "text"))}
CURSOR_1 = {"vision": {"epoch": 1}}
EVERY = 4
BAD = ("silent", "too short")  # kinds of bad samples, by rank


def build() -> tuple[Any, Pretrain]:
    config = recipes.load("joint_tiny", [*joint_sets.SMALL, f"log.every={EVERY}"])
    torch.manual_seed(0)
    return config, Pretrain.create(config).train()


def steps(
    telemetry: Telemetry,
    task: Pretrain,
    order: list[str],
    first: int = 1,
    cursor: dict[str, Any] = CURSOR,
) -> None:
    for step, modality in enumerate(order, start=first):
        batches = batches_of(task, modality, step)
        count = sum(len(batch.masked) for batch in batches)
        for batch in batches:
            telemetry.add(modality, task(batch, count)[1])
        step_batch = StepBatch(
            modality=modality,
            micro_batches=batches,
            count=count,
            samples=8,
            units=2.0,
            cursor=cursor,
            source=modality,
            bad={BAD[dist.get_rank() if dist.is_initialized() else 0]: step % 2},
        )
        settings = StepSettings(step=step - 1, lr=0.1, weight_decay=0.01, ema_decay=0.99)
        telemetry.step_done(step_batch, settings, step, 8 * step, torch.tensor(float(step)))


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_each_modality_is_reported_over_its_own_steps(tmp_path: Path) -> None:
    config, task = build()
    order = ["speech", "vision", "speech", "speech", "vision", "vision", "text", "vision"]
    with Telemetry(config, RunFolder(tmp_path), task, 0, Watchdog(0, 1)) as telemetry:
        steps(telemetry, task, order)
    mixed = rows(tmp_path)
    assert [{n.partition("/")[2] for n in row if n.startswith("loss/")} for row in mixed] == [
        {"speech", "vision"},
        {"vision", "text"},
    ]
    assert [row["grad_norm/vision"] for row in mixed] == [2, 8]
    assert mixed[1]["epoch/text"] == 2 and [row["bad"] for row in mixed] == [2, 4]
    for row, seconds in zip(mixed, (6, 0), strict=True):
        assert ("audio_h_per_h" in row) == bool(seconds)
    # A run with only this modality reports the same values.
    with Telemetry(config, RunFolder(tmp_path / "b"), task, 0, Watchdog(0, 1)) as other:
        for step, modality in enumerate(order[:EVERY], start=1):
            if modality == "speech":
                steps(other, task, ["speech"], first=step)
    [alone] = rows(tmp_path / "b")
    for name, value in alone.items():
        if name.endswith("/speech"):
            assert mixed[0][name] == value, name


def test_a_single_modality_is_reported_without_its_name(tmp_path: Path) -> None:
    """A single modality may still have several corpora, each with its own epoch."""
    config, task = build()
    task.modalities = {"vision": task.modalities["vision"]}
    corpora = {"vision/a": {"epoch": 3}, "vision/b": {"epoch": 4}}
    for cursor, names in (
        (corpora, ["epoch/vision/a", "epoch/vision/b"]),
        (CURSOR_1, ["epoch"]),
    ):
        run = RunFolder(tmp_path / str(len(names)))
        with Telemetry(config, run, task, 0, Watchdog(0, 1)) as telemetry:
            steps(telemetry, task, ["vision"] * EVERY, cursor=cursor)
        [row] = rows(run.root)
        assert {"loss", "target_spread", "grad_norm", *names} <= row.keys()
        assert [name for name in row if "/" in name and not name.startswith("bad/")] == [
            name for name in names if "/" in name
        ]


@pytest.mark.parametrize("collapsed", ["speech", "vision"])
def test_the_modality_that_collapsed_is_named(
    collapsed: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: Any
) -> None:
    config, task = build()
    features = task.student.encoder.front_end(collapsed).features
    with torch.no_grad():
        for name, p in [*features.named_parameters(), *features.named_buffers()]:  # type: ignore[union-attr]
            if name.startswith(("proj", "positions")):
                p.zero_()
    monkeypatch.setattr(logging.getLogger("d2v_ds"), "propagate", True)
    order = ["speech", "vision", "speech", "vision"]
    with Telemetry(config, RunFolder(tmp_path), task, 0, Watchdog(0, 1)) as telemetry:
        steps(telemetry, task, order)
    warned = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert any(
        f"{collapsed}: the output of the front end hardly changes" in text for text in warned
    )
    assert all(f"{collapsed}: " in text for text in warned)


def bad_of_ranks(folder: str) -> None:
    config, task = build()
    run = RunFolder(Path(folder))
    with Telemetry(config, run, task, 0, Watchdog(0, 1)) as telemetry:
        steps(telemetry, task, ["vision"] * EVERY)


def test_bad_samples_are_summed_over_ranks(
    tmp_path: Path, run_ranks: Callable[..., list[Any]]
) -> None:
    run_ranks(2, bad_of_ranks, str(tmp_path))
    [row] = rows(tmp_path)
    assert (row["bad"], row["bad/silent"], row["bad/too_short"]) == (4, 2, 2)
    assert "bad/damaged" not in row


def test_a_skipped_attempt_is_in_no_sum(tmp_path: Path) -> None:
    """The attempt is repeated with another batch; its metrics may be NaN."""
    config, task = build()
    found = []
    for folder, attempts in (("a", 0), ("b", 3)):
        with Telemetry(config, RunFolder(tmp_path / folder), task, 0, Watchdog(0, 1)) as telemetry:
            for step in range(1, EVERY + 1):
                for _ in range(attempts * (step == 2)):
                    batches = batches_of(task, "vision", 77)
                    _, sums = task(batches[0], 1)
                    telemetry.add("vision", {name: x * math.nan for name, x in sums.items()})
                    skipped = StepBatch("vision", batches, 1, 8, 2.0, CURSOR, bad={"silent": 1})
                    telemetry.step_skipped(skipped)
                steps(telemetry, task, ["vision"], first=step)
        found += rows(tmp_path / folder)
    for name, value in found[0].items():
        if name.endswith("/vision"):
            assert found[1][name] == value, name
    assert [row["skipped"] for row in found] == [0, 3]
    assert [row["bad"] for row in found] == [2, 5]
    assert [row["steps/vision"] for row in found] == [EVERY, EVERY]


def test_a_step_whose_metrics_are_not_finite_does_not_blank_the_row(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: Any
) -> None:
    monkeypatch.setattr(logging.getLogger("d2v_ds"), "propagate", True)
    config, task = build()
    with Telemetry(config, RunFolder(tmp_path), task, 0, Watchdog(0, 1)) as telemetry:
        for step in range(1, 2 * EVERY + 1):
            if step == 2 or step > EVERY:
                _, sums = task(batches_of(task, "vision", 1)[0], 1)
                telemetry.add("vision", {name: x * math.nan for name, x in sums.items()})
            steps(telemetry, task, ["vision"], first=step)
    first, second = rows(tmp_path)
    assert first["steps/vision"] == EVERY - 1 and first["not_finite"] == 1
    assert first["loss/vision"] > 0 and first["target_rank/vision"] > 1
    assert second["steps/vision"] == 0 and second["not_finite"] == 1 + EVERY
    assert second["loss/vision"] is None
    assert "vision: the metrics of 1 of 4 steps are not finite" in caplog.text


def test_counts_continue_where_a_checkpoint_has_them(tmp_path: Path) -> None:
    config, task = build()
    counts = Counts(skipped=2, not_finite=1.0, bad={"silent": 5, "damaged": 1})
    run = RunFolder(tmp_path)
    with Telemetry(config, run, task, 0, Watchdog(0, 1), counts) as telemetry:
        steps(telemetry, task, ["vision"] * EVERY)
    [row] = rows(tmp_path)
    assert (row["skipped"], row["not_finite"], row["bad"]) == (2, 1, 8)
    assert (row["bad/silent"], row["bad/damaged"]) == (7, 1)


@pytest.mark.parametrize("stream", [None, io.StringIO()])
def test_without_a_terminal_there_is_no_bar(stream: Any, tmp_path: Path, monkeypatch: Any) -> None:
    config, task = build()
    monkeypatch.setattr(sys, "stderr", stream)
    with Telemetry(config, RunFolder(tmp_path), task, 0, Watchdog(0, 1)) as telemetry:
        assert telemetry.bar is None
