"""Exchanges between ranks: results and failures reach every rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch.distributed as dist

from d2v_ds.distributed.collectives import (
    RankFailed,
    RankSums,
    all_true,
    on_all_ranks,
    on_rank_0,
)
from d2v_ds.errors import Superseded, UserError

RunRanks = Callable[..., list[Any]]


def failing(kind: type[Exception], rank: int) -> str:
    """Fails on one rank; returns what was raised on this one."""

    def action() -> None:
        if dist.get_rank() == rank:
            raise kind("lost")

    try:
        on_all_ranks(action)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (UserError, "UserError: lost"),
        (Superseded, "Superseded: lost"),
        (AssertionError, "AssertionError: lost"),
        (KeyError, "RankFailed: rank 1: KeyError: 'lost'"),
    ],
)
def test_a_failure_on_one_rank_is_raised_on_all(
    run_ranks: RunRanks, kind: type[Exception], message: str
) -> None:
    assert run_ranks(3, failing, kind, 1) == [message] * 3


def exchanged() -> Any:
    rank, sums = dist.get_rank(), RankSums(dist.get_world_size())
    first, second = sums.begin(2**52 + 1, 0.5), sums.begin(float(rank))
    return (
        on_all_ranks(lambda: rank * 10),
        on_rank_0(lambda: f"from {rank}"),
        [all_true(True), all_true(rank > 0)],
        first(),
        second(),
    )


def test_results_reach_all_ranks(run_ranks: RunRanks) -> None:
    expected = ([0, 10], "from 0", [True, False], [2**53 + 2, 1.0], [1.0])
    assert run_ranks(2, exchanged) == [expected] * 2


def test_a_single_process_exchanges_with_itself() -> None:
    assert on_all_ranks(lambda: 5) == [5] and on_rank_0(lambda: 6) == 6 and not all_true(False)
    assert RankSums(1).begin(1.5)() == [1.5]
    with pytest.raises(RankFailed, match="rank 0: KeyError: 'lost'") as caught:
        on_all_ranks(lambda: {}["lost"])
    assert isinstance(caught.value.__cause__, KeyError)
