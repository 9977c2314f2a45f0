"""Fixtures that several test files share."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import settings

from tests import ROOT
from tests.helpers.rank_pool import Pool

# A shell starts what runs in its background with Ctrl-C ignored, and so would be every process
# that a test starts and then interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)


# The same examples in every run of the same code: what fails, fails again.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")


# Files that take minutes. They start first, so that none runs alone at the end.
LONG = ("slurm/", "test_train.py", "test_tiny_recipes.py", "test_docs.py", "test_joint_runs.py")


@pytest.hookimpl(wrapper=True)  # xdist reads the marks first of all
def pytest_collection_modifyitems(items: list[pytest.Item]) -> Iterator[None]:
    """Gives each file to one worker, because its tests share fixtures, and tests/slurm/ as a whole,
    because its tests share a cluster."""

    def group(item: pytest.Item) -> str:
        path = item.path.relative_to(ROOT / "tests").as_posix()
        return "slurm/" if path.startswith("slurm/") else path

    for item in items:
        item.add_marker(pytest.mark.xdist_group(group(item)))
    items.sort(key=lambda item: LONG.index(group(item)) if group(item) in LONG else len(LONG))
    yield


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
