"""Fixtures that several test files share."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from multiprocessing.util import Finalize
from typing import Any

import pytest
from hypothesis import settings

from d2v_ds.data.audio import import_torchaudio
from tests.helpers.rank_pool import Pool

# A shell starts background jobs with SIGINT ignored. Processes of the tests would inherit that, and
# the tests could not interrupt them.
signal.signal(signal.SIGINT, signal.default_int_handler)


# The same examples in every run of the same code, so that failures are reproducible.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")


def pytest_configure() -> None:
    """Temporary files, which killed processes leave behind, go into a folder that is removed at the
    end. The path must be short, because it is the start of the paths of sockets."""
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())  # for tmp_path
    folder = tempfile.mkdtemp(prefix="d2v-")
    os.environ["TMPDIR"] = tempfile.tempdir = folder
    # After the finalizers of multiprocessing, whose own folder is inside, with priority -100.
    Finalize(None, shutil.rmtree, (folder, True), exitpriority=-200)


# Groups of tests that take minutes. They start first, so that none runs alone at the end.
LONG = ("slurm", "test_train.py", "test_tiny_recipes.py", "test_docs.py", "test_joint_runs.py")


def group(nodeid: str) -> str:
    """What one worker runs: a file, because its tests share fixtures, and all of tests/slurm/,
    because its tests share a cluster."""
    path = nodeid.partition("::")[0].removeprefix("tests/")
    return "slurm" if path.startswith("slurm/") else path


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def order(item: pytest.Item) -> int:
        own = group(item.nodeid)
        return LONG.index(own) if own in LONG else len(LONG)

    items.sort(key=order)


@pytest.hookimpl(optionalhook=True)  # pytest-xdist may be missing
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group(nodeid)

    config.option.loadscopereorder = False  # keeps the order of the tests
    return Groups(config, log)


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    pool = Pool()
    yield pool
    pool.stop()


@pytest.fixture(scope="session")
def remote_code(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Prepares transformers, which keeps copies of remote code: the tests give it a folder of
    their own. torchaudio is imported first, with our workaround for a mismatched wheel."""
    import_torchaudio()
    from transformers import dynamic_module_utils

    dynamic_module_utils.HF_MODULES_CACHE = str(tmp_path_factory.mktemp("modules"))


@pytest.fixture
def run_ranks(pool: Pool) -> Callable[..., list[Any]]:
    """run_ranks(2, function, *arguments, timeout=120) -> [result of rank 0, of rank 1]."""

    def run(ranks: int, function: Callable[..., Any], *args: Any, timeout: float = 120) -> Any:
        return pool.run(ranks, function, *args, timeout=timeout)

    return run
