"""Timing for the benchmarks: a clock for the parts of a step, and the speed of the machine."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from d2v_ds.step import Observer


class Clock(Observer):
    """Seconds by part; waits for the GPU if there is one."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        self._wait()
        start = time.perf_counter()
        yield
        self._wait()
        self.seconds[part] += time.perf_counter() - start

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def matmul_gflops(device: torch.device, n: int = 1024) -> float:
    a = torch.randn(n, n, device=device)
    clock = Clock(device)
    for _ in range(4):
        with clock.timed("matmul"):
            torch.mm(a, a)
    return 4 * 2 * n**3 / clock.seconds["matmul"] / 1e9
