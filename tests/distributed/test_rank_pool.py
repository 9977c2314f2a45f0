"""The pool of ranks: a failure on a rank fails the test and names the rank."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.helpers.rank_pool import Pool, RankError


@pytest.fixture(scope="module")
def own_pool() -> Iterator[Pool]:
    """A separate pool, so that other tests keep theirs."""
    pool = Pool()
    yield pool
    pool.stop()


def ranks_and_sum(value: int) -> tuple[int, int, float]:
    total = torch.tensor([float(value * (dist.get_rank() + 1))])
    dist.all_reduce(total)
    return dist.get_rank(), dist.get_world_size(), total.item()


def misbehave(how: str, rank: int) -> Any:
    if dist.get_rank() == rank:
        if how == "raise":
            raise KeyError("lost")
        if how == "die":
            os._exit(7)
        time.sleep(60)
    dist.all_reduce(torch.zeros(1))  # so that the other ranks wait


def test_functions_run_on_the_requested_number_of_ranks(pool: Pool) -> None:
    assert pool.run(2, ranks_and_sum, 10) == [(0, 2, 30), (1, 2, 30)]
    assert pool.run(1, ranks_and_sum, 10) == [(0, 1, 10)]
    assert pool.run(4, ranks_and_sum, 1) == [(rank, 4, 10) for rank in range(4)]
    assert not dist.is_initialized(), "the ranks are other processes"


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("raise", r"(?s)misbehave failed.*rank 1: Traceback.*KeyError: 'lost'"),
        pytest.param("die", r"rank 1: it died, exit code 7", marks=pytest.mark.slow),
        pytest.param("hang", r"rank 1 gave no answer within 2 s", marks=pytest.mark.slow),
    ],
)
def test_a_failing_rank_fails_the_call_and_the_pool_stays_usable(
    own_pool: Pool, how: str, message: str
) -> None:
    own_pool.run(2, ranks_and_sum, 10)
    with pytest.raises(RankError, match=message):
        own_pool.run(2, misbehave, how, 1, timeout=2)
    assert own_pool.run(2, ranks_and_sum, 10) == [(0, 2, 30), (1, 2, 30)]
