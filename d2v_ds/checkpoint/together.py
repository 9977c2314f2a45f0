"""Steps that all ranks take together, over a CPU backend; with no process group, one rank alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from d2v_ds.errors import UserError
from d2v_ds.run_folder import Superseded

T = TypeVar("T")


class SaveError(RuntimeError):
    """A checkpoint could not be written, on whichever rank; the earlier ones are untouched."""


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


def together(action: Callable[[], T]) -> list[T]:
    """Runs `action` on every rank; its results, by rank. What fails on one is raised on all."""
    result: Any = None
    failure: Exception | None = None
    cause: Exception | None = None
    try:
        result = action()
    except (UserError, Superseded, AssertionError) as error:
        failure = error
    except Exception as error:  # others may not survive the way to another process
        failure, cause = SaveError(f"rank {own_rank()}: {type(error).__name__}: {error}"), error
    outcomes = all_gather((failure, result))
    for failed, _ in outcomes:
        if failed is not None:
            raise failed from cause
    return [given for _, given in outcomes]
