"""One cluster per session; every test finds it complete and empty."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import HERE, Cluster, Workplace

NODES = 3


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """These tests depend on wall-clock time, so they run last, one after another."""
    items.sort(key=lambda item: Path(str(item.path)).parent == HERE)


def why_not() -> str:
    """The reason why Slurm cannot run here; empty if it can."""
    for command in ("slurmctld", "slurmd", "sbatch", "munged"):
        if not shutil.which(command, path=f"{os.environ['PATH']}:/usr/sbin:/sbin"):
            return (
                f"{command} is not installed (apt-get install slurmctld slurmd slurm-client munge)"
            )
    return ""


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    reason = why_not()
    if reason:
        if os.environ.get("D2V_REQUIRE_SLURM"):
            pytest.fail(f"no Slurm: {reason}")
        pytest.skip(f"no Slurm: {reason}")
    folder = Path(tempfile.mkdtemp(prefix="d2v-slurm-"))  # a short path: it contains Unix sockets
    cluster = Cluster(folder / "c", VSLURM_NODES=str(NODES))
    try:
        cluster("up")
        yield cluster
    finally:
        subprocess.run([HERE / "vslurm.sh", "down"], env=cluster.environment, timeout=120)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def whole_cluster(cluster: Cluster) -> Iterator[None]:
    """All nodes are up before the test, and no job is left after it."""
    cluster("up")
    yield
    cluster.command("scancel", "--user", str(os.getuid()))
    cluster("up")  # boots crashed nodes and plugs their cables
    deadline = time.monotonic() + 20
    while cluster.command("squeue", "--noheader").stdout and time.monotonic() < deadline:
        time.sleep(0.1)


@pytest.fixture
def standin(cluster: Cluster, tmp_path: Path) -> Workplace:
    """Jobs whose `d2v-ds` is the stand-in."""
    return Workplace(cluster, tmp_path / "home", standin_settings())


@pytest.fixture
def trainer(cluster: Cluster, tmp_path: Path) -> Workplace:
    """Jobs that run the real commands."""
    return Workplace(cluster, tmp_path / "home", real_settings(tmp_path / "bin"))


def standin_settings() -> str:
    """A cluster.env with the stand-in as d2v-ds."""
    return (
        f"export PATH={HERE / 'standin'}:{Path(sys.executable).parent}:$PATH\n"
        "export D2V_DUMP_SECONDS=1 D2V_MIN_FREE_MB=10\n"
    )


def real_settings(bin: Path) -> str:
    """A cluster.env with the d2v-ds and d2v-shards of this checkout, run by this Python."""
    bin.mkdir()
    for name, module in (("d2v-ds", "d2v_ds"), ("d2v-shards", "shards.cli")):
        script = bin / name
        script.write_text(f'#!/bin/sh\nexec {sys.executable} -m {module} "$@"\n')
        script.chmod(0o755)
    root = HERE.parent.parent
    return (
        f"export PATH={bin}:$PATH PYTHONPATH={root} OMP_NUM_THREADS=1 D2V_MIN_FREE_MB=10\n"
        "export D2V_HANG_SECONDS=120\n"
    )
