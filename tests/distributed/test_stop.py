"""Stop requests, by a signal or a file, on one or all ranks."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from d2v_ds.distributed.collectives import barrier
from d2v_ds.distributed.stop import StopFlag

RunRanks = Callable[..., list[Any]]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2, signal.SIGINT])
def test_a_signal_only_sets_the_flag(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopFlag() as stop:
        assert not stop.agreed()
        os.kill(os.getpid(), number)
        assert stop.agreed() and stop.reason == number.name
    assert signal.getsignal(number) == before


def test_a_file_stops(tmp_path: Path) -> None:
    with StopFlag(tmp_path) as stop:
        assert not stop.agreed()
        (tmp_path / "STOP").touch()
        assert stop.agreed() and stop.reason == str(tmp_path / "STOP")


def stop_on(rank: int, folder: Path | None) -> list[bool]:
    with StopFlag(folder) as stop:
        answers = [stop.agreed()]
        if dist.get_rank() == rank:
            if folder is None:
                os.kill(os.getpid(), signal.SIGUSR2)
            else:
                (folder / "STOP").touch()
        barrier()
        return [*answers, stop.agreed()]


def test_all_ranks_agree(run_ranks: RunRanks, tmp_path: Path) -> None:
    assert run_ranks(2, stop_on, 1, None) == [[False, True]] * 2
    assert run_ranks(2, stop_on, 1, tmp_path) == [[False, True]] * 2
    assert run_ranks(2, stop_on, 5, None) == [[False, False]] * 2
