"""Runs that are disturbed while they start, save or end; other tests disturb single parts."""

from __future__ import annotations

import json
import logging
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from d2v_ds import cli
from d2v_ds.checkpoint import CannotSave
from d2v_ds.config import Optim
from d2v_ds.distributed import signals
from d2v_ds.distributed.stop import StopFlag
from d2v_ds.errors import Superseded, UserError
from d2v_ds.run.heartbeat import heartbeats
from d2v_ds.run.run_folder import RunFolder, claim_generation
from d2v_ds.run.watchdog import Watchdog
from d2v_ds.telemetry import Counts
from d2v_ds.train import ends_are_told
from d2v_ds.train_state import TrainState
from d2v_ds.training import LAST_SAVES, Training
from tests.test_train import shards, speech_run

__all__ = ["shards"]  # a fixture


@pytest.mark.parametrize("nproc", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_signal_while_a_run_starts_stops_it_without_an_error(
    nproc: int,
    shards: Path,
    tmp_path: Path,
) -> None:
    settings = ["run.steps=500", "data.workers=0", "engine.config=zero1"]
    run = speech_run(tmp_path / "run", shards, *settings)
    process = run.start(nproc=nproc)
    while not catches(process.pid, signal.SIGTERM):
        assert process.poll() is None
        time.sleep(0.01)  # less than the imports take
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert json.loads(run.folder.stopped.read_text())["reason"] == "SIGTERM"
    assert "Traceback" not in output


def catches(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal."""
    status = Path(f"/proc/{pid}/status").read_text()
    [caught] = [line.split()[1] for line in status.splitlines() if line.startswith("SigCgt")]
    return bool(int(caught, 16) >> (number - 1) & 1)


def test_a_signal_before_training_stops_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "received", [signal.SIGUSR2])
    with StopFlag() as stop:
        assert stop.agreed() and stop.reason == "SIGUSR2"


def test_a_second_ctrl_c_ends_a_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "received", [])
    signals._remember(signal.SIGTERM, None)
    signals._remember(signal.SIGTERM, None)
    signals._remember(signal.SIGINT, None)
    with pytest.raises(KeyboardInterrupt):
        signals._remember(signal.SIGINT, None)


def test_a_superseded_start_is_told_in_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def superseded(arguments: Any) -> int:
        raise Superseded("RUN is owned by generation 3 (job 7, restart 1, node:12)")

    monkeypatch.setattr(cli, "list_recipes", superseded)
    assert cli.main(["recipes"]) == 1
    assert capsys.readouterr().err == (
        "d2v-ds: RUN is owned by generation 3 (job 7, restart 1, node:12)\n"
    )


# ------------------------------------------------------------------------------------ parts of it


class Disk:
    """A saver on a disk that may be full."""

    def __init__(self) -> None:
        self.full, self.saved, self.pending = True, 10, 0
        self.rescued = False

    def start(self, step: int, **_: Any) -> None:
        self.pending = step

    def finish(self) -> None:
        step, self.pending = self.pending, 0
        if step and self.full:
            raise CannotSave(f"/run/checkpoints: rank 0 cannot write checkpoint {step}: no space")
        self.saved = step or self.saved

    def rescue(self, seconds: float) -> None:
        self.rescued = True


def training(run: RunFolder, disk: Disk, watchdog: Watchdog, step: int = 30) -> Training:
    parts: dict[str, Any] = dict.fromkeys(Training.__dataclass_fields__)
    parts |= {"run": run, "saver": disk, "watchdog": watchdog, "state": TrainState(step)}
    parts |= {"world": SimpleNamespace(rank=0, size=1), "quarantines": {}, "found": {}}
    parts |= {
        "engine": SimpleNamespace(partitions=dict),
        "shapes": {},
        "config": Optim(),
    }
    return Training(**parts)


def test_a_save_that_fails_ends_nothing_until_the_last(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("d2v_ds"), "propagate", True)
    disk = Disk()
    t = training(RunFolder(tmp_path), disk, Watchdog(0, 1))
    t.save(Counts())
    t.save(Counts())  # tells that the one before has failed
    assert "no space; training continues with checkpoint 10 and tries again" in caplog.text
    pauses: list[float] = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        disk.full = len(pauses) < frees

    monkeypatch.setattr("time.sleep", pause)
    frees = 1000  # the number of pauses after which the disk has space
    with pytest.raises(CannotSave, match="ends at step 30, but only step 10 is saved"):
        t.save_last(Counts())
    assert len(pauses) == LAST_SAVES - 1 and "trying again for 120 s" in caplog.text
    pauses.clear()
    frees = 3
    t.save_last(Counts())
    assert disk.saved == 30 and len(pauses) == 3


@pytest.mark.parametrize("error", [UserError("bad input"), RuntimeError("connection lost")])
def test_an_error_reaches_the_log_the_status_and_the_checkpoints(
    error: Exception, tmp_path: Path
) -> None:
    run, disk = RunFolder(tmp_path / "run"), Disk()
    with Watchdog(0, 1) as watchdog:
        watchdog.start(run, claim_generation(run, "local"))
        with pytest.raises(type(error)), ends_are_told(watchdog) as saving:
            saving.append(cast(Any, disk))
            raise error
    [beat] = heartbeats(run)
    assert beat.phase == "ended" and str(error) in beat.reason and disk.rescued


def test_counts_of_all_ranks_are_in_the_state(
    tmp_path: Path, run_ranks: Callable[..., list[Any]]
) -> None:
    assert (
        run_ranks(2, count_on_rank, str(tmp_path))
        == [
            {
                **{"skipped": 1, "not_finite": 2.0, "replaced": {"silent": 4, "damaged": 1}},
                **{"bad": {"speech": 6, "text": 1}},
                **{"listed": {"rank00000.jsonl": 1, "rank00001.jsonl": 2, "rank00007.jsonl": 9}},
            }
        ]
        * 2
    )


def count_on_rank(folder: str) -> dict[str, Any]:
    import torch.distributed as dist

    rank, run = dist.get_rank(), RunFolder(Path(folder))
    t = training(run, Disk(), Watchdog(rank, 2))
    t.world = cast(Any, SimpleNamespace(rank=rank, size=2))
    t.quarantines = cast(Any, {"speech": SimpleNamespace(new=2), "text": SimpleNamespace(new=rank)})
    t.found = {"speech": 2}
    t.state.listed = {"rank00007.jsonl": 9}
    run.bad_samples(rank).parent.mkdir(exist_ok=True)
    run.bad_samples(rank).write_text("{}\n" * (rank + 1))
    bad = {"silent": 2} if rank else {"silent": 2, "damaged": 1}
    t._count(Counts(skipped=1 - rank, not_finite=2.0 * rank, bad=bad))
    names = ("skipped", "not_finite", "replaced", "bad", "listed")
    return {name: getattr(t.state, name) for name in names}


def test_states_of_older_versions_resume() -> None:
    state = TrainState.from_manifest({"step": 7, "position": {"speech": {"epoch": 1}}})
    assert (state.step, state.cursor, state.skipped) == (7, {"speech": {"epoch": 1}}, 0)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (None, "has no state"),
        ({"step": 1, "colour": 2}, "written by a newer d2v_ds: its state has 'colour'"),
        ({"step": -1}, "damaged: step is -1"),
        ({"best": {"step": 1}}, "damaged: best is"),
        ({"units": {"speech": "x"}}, "damaged: units is"),
    ],
)
def test_a_damaged_state_is_refused(raw: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        TrainState.from_manifest(raw)
