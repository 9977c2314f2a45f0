"""A task from outside the package, without a teacher, in the package's training loop: metrics,
checkpoints, resume, ZeRO."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from d2v_ds.checkpoint import open_checkpoint
from d2v_ds.distributed.launcher import launch
from d2v_ds.exit_codes import FINISHED, UNHEALTHY
from d2v_ds.train import MAX_SKIPPED
from tests import ROOT
from tests.helpers.regress import BIASED
from tests.helpers.runs import Run, assert_equal_runs
from tests.helpers.series import write_set

LENGTHS = [[200, 90, 300, 40] * 3, [120] * 8]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(tmp_path_factory.mktemp("sets") / "series", LENGTHS).root


def run(root: Path, data: Path, ranks: int, *settings: str, expected: int = FINISHED) -> Run:
    """Runs the program tests/helpers/regress.py on `ranks` ranks. expected: its exit code."""
    words = [f"run.dir={root}", f"data.shards={data}", *settings]
    code = launch(ranks, words, command=(sys.executable, "-m", "tests.helpers.regress"))
    assert code == expected
    return Run(root, "")


@pytest.fixture(scope="module", autouse=True)
def environment() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run(tmp_path_factory.mktemp("whole"), data, 1, "engine.config=local")


def test_a_task_without_a_teacher_trains_and_resumes(
    whole: Run, data: Path, tmp_path: Path
) -> None:
    for steps in (4, 8):
        parts = run(tmp_path, data, 1, "engine.config=local", f"run.steps={steps}")
    assert_equal_runs(parts, whole)
    losses = list(whole.losses().values())
    assert losses[-1] < losses[0] / 2
    log = (tmp_path / "logs/local.1/rank00000.txt").read_text()
    assert "resuming at step 4" in log and "97 parameters to train;" in log
    assert "averaged by the teacher" not in log


def test_custom_scalars_reach_rows_console_and_tensorboard(whole: Run) -> None:
    rows = whole.rows()
    assert {"loss", "bias", "grad_norm", "lr"} <= rows[0].keys()
    assert "target_spread" not in rows[0]
    events = EventAccumulator(str(whole.folder.tensorboard))
    events.Reload()
    assert {"loss/total", "repr/bias", "optim/lr"} <= set(events.Tags()["scalars"])
    assert "mask/series" in events.Tags()["images"]
    log = (whole.folder.root / "logs/local.0/rank00000.txt").read_text()
    assert f"step 1 of 8: loss {rows[0]['loss']:.4f}; " in log
    biased = [row["step"] for row in rows if abs(row["bias"]) > BIASED]
    assert biased and log.count("the prediction is biased") == len(biased)


def test_its_checkpoints_have_no_averages_and_zero_equals_the_local_engine(
    whole: Run, data: Path, tmp_path: Path
) -> None:
    two = run(tmp_path, data, 2, "engine.config=zero2")
    assert two.losses() == pytest.approx(whole.losses(), rel=1e-5)
    found = open_checkpoint(two.folder.checkpoint(8))
    found.verify()
    assert found.tensors("ema") == {} and found.tensors("ema_compensation") == {}
    assert found.tensors("master").keys() == found.shapes.keys() == found.adam_steps.keys()


def test_a_run_without_finite_gradients_ends(data: Path, tmp_path: Path) -> None:
    """The first update makes all later activations infinite."""
    lost = run(tmp_path, data, 2, "engine.config=zero2", "optim.lr=1e12", expected=UNHEALTHY)
    assert list(lost.losses()) == [1] and not lost.folder.done.exists()
    log = (tmp_path / "logs/local.0/rank00000.txt").read_text()
    assert log.count("step 2 is skipped: its gradient is not finite") == MAX_SKIPPED
    assert f"{MAX_SKIPPED} consecutive steps had no finite gradient: lower optim.lr" in log
