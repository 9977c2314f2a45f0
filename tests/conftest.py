"""Fixtures that several test files share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from ranks import Pool


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    pool = Pool()
    yield pool
    pool.stop()


@pytest.fixture
def run_ranks(pool: Pool) -> Callable[..., list[Any]]:
    """run_ranks(2, function, *arguments, timeout=120) -> [result of rank 0, of rank 1]."""

    def run(ranks: int, function: Callable[..., Any], *args: Any, timeout: float = 120) -> Any:
        return pool.run(ranks, function, *args, timeout=timeout)

    return run
