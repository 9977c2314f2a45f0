"""Fixtures that several test files share."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import settings

from tests.helpers.rank_pool import Pool

# A shell starts what runs in its background with Ctrl-C ignored, and so would be every process
# that a test starts and then interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)


# The same examples in every run of the same code: what fails, fails again.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")


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
