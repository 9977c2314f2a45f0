"""Stopping: a signal to any rank, or a STOP file, ends the run on all ranks after the same step."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from d2v_ds.distributed import signals
from d2v_ds.distributed.signals import STOP_SIGNALS


class StopFlag:
    """Whether the run should stop after this step: a signal to any rank, or a file STOP in the run
    folder. A context manager in which signals only set the flag. Collective: all ranks must
    enter it, after the process group exists."""

    def __init__(self, run_dir: Path | None = None) -> None:
        self.reason = ""  # on this rank: the name of the signal or the file
        logs = os.environ.get("D2V_JOB_LOGS")  # where a batch script asks to stop
        self._files = [Path(run_dir, "STOP")] if run_dir else []
        self._files += [Path(logs, "stop")] if logs else []
        self._before: dict[signal.Signals, Any] = {}
        self._group: Any = None

    def __enter__(self) -> StopFlag:
        if dist.is_initialized() and dist.get_world_size() > 1:
            self._group = dist.new_group(backend="gloo")  # never waits for a GPU
        if signals.received:  # while this process was starting
            self.reason = signals.received[0].name
        self._before = {number: signal.signal(number, self._set) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _set(self, number: int, frame: FrameType | None) -> None:
        self.reason = signal.Signals(number).name

    def agreed(self) -> bool:
        """True on all ranks once any of them was asked to stop. Collective."""
        on_rank_0 = not dist.is_initialized() or dist.get_rank() == 0
        if on_rank_0 and not self.reason:  # one rank polls the file system
            self.reason = next((str(file) for file in self._files if file.exists()), "")
        if self._group is None:
            return bool(self.reason)
        flag = torch.tensor([int(bool(self.reason))])
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group)
        return bool(flag.item())
