"""Small exchanges between ranks, on the host; without a process group there is one rank."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from d2v_ds.errors import Superseded, UserError

T = TypeVar("T")


class RankFailed(RuntimeError):
    """An action failed on one rank; raised on all of them, with that rank's number and reason."""


def own_rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def rank_count() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def all_gather(value: T) -> list[T]:
    """`value` of every rank, by rank."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * rank_count()
    dist.all_gather_object(values, value)
    return values


def all_true(flag: bool) -> bool:
    """Whether `flag` is true on every rank; cheap."""
    if not dist.is_initialized():
        return flag
    everywhere = torch.tensor(int(flag))
    dist.all_reduce(everywhere, dist.ReduceOp.MIN)
    return bool(everywhere)


def on_all_ranks(action: Callable[[], T]) -> list[T]:
    """Runs `action` on every rank and returns its results by rank. A failure on one rank is raised
    on all: UserError, Superseded and AssertionError unchanged, anything else as RankFailed."""
    result: Any = None
    failure: Exception | None = None
    cause: Exception | None = None
    try:
        result = action()
    except (UserError, Superseded, AssertionError) as error:
        failure = error
    except Exception as error:  # may not survive pickling
        failure, cause = RankFailed(f"rank {own_rank()}: {type(error).__name__}: {error}"), error
    outcomes = all_gather((failure, result))
    for failed, _ in outcomes:
        if failed is not None:
            raise failed from cause
    return [given for _, given in outcomes]


def on_rank_0(action: Callable[[], T]) -> T:
    """Runs `action` on rank 0 only; returns its result, or raises its error, on all ranks."""
    results: list[Any] = on_all_ranks(lambda: action() if own_rank() == 0 else None)
    result: T = results[0]
    return result


def barrier() -> None:
    """Waits for all ranks, on the host."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(torch.zeros(1))


def sums_right(device: torch.device, seconds: float = 30.0) -> bool:
    """Whether an all-reduce over all ranks is correct and finishes in time. Collective."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return True
    ranks = dist.get_world_size()
    values = torch.arange(4096, dtype=torch.float64, device=device) % 97
    total = values * (dist.get_rank() + 1)
    work = dist.all_reduce(total, async_op=True)
    deadline = time.monotonic() + seconds
    while not work.is_completed():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.001)
    work.wait()
    return bool(torch.equal(total, values * (ranks * (ranks + 1) // 2)))


class RankSums:
    """Sums numbers over the ranks, on the host, in the background. Collective: all ranks must
    construct it, and call `begin` each time. A single rank communicates nothing."""

    def __init__(self, world: int) -> None:
        self._group: Any = None
        if world > 1:
            self._group = dist.new_group(backend="gloo")  # never waits for a GPU

    def begin(self, *numbers: float) -> Callable[[], list[float]]:
        """Starts the sums and returns a function that waits for them. Integers below 2**53 are
        exact."""
        if self._group is None:
            return lambda: list(numbers)
        totals = torch.tensor(numbers, dtype=torch.float64)
        work = dist.all_reduce(totals, group=self._group, async_op=True)

        def sums() -> list[float]:
            work.wait()
            return [float(total) for total in totals]

        return sums
