"""Worker processes that stall, die or raise: the error names the worker and its sample."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from d2v_ds.data.shard_format import ShardSet
from d2v_ds.errors import UserError
from d2v_ds.loader.loader import Loader
from d2v_ds.loader.quarantine import Quarantine
from d2v_ds.loader.workers import LoaderWorkers
from tests import ROOT
from tests.helpers.processes import alive
from tests.helpers.sensor import Sensor, SensorConfig
from tests.helpers.series import write_set
from tests.loader.test_loader import gone

ODD = 77  # the length of that sample


class Odd(Sensor):
    """One sample stalls or kills the worker that decodes it, or triggers a bug."""

    def __init__(self, what: str) -> None:
        super().__init__(SensorConfig())
        self.what = what

    def decode(self, sample: Mapping[str, bytes], rng: np.random.Generator) -> Any:
        if len(sample["series"]) == 2 * ODD:
            if self.what == "stall":
                time.sleep(60)
            elif self.what == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            elif self.what == "fault":
                raise KeyError("of a library")
        return super().decode(sample, rng)

    def fit(self, example: Any, length: int) -> Any:
        if length == ODD and self.what == "bug":
            raise KeyError("a bug")
        return super().fit(example, length)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    lengths = [[50] * 30, [50, 50, ODD, *[50] * 27]]
    return write_set(tmp_path_factory.mktemp("sets") / "series", lengths)


def odd_loader(shards: ShardSet, what: str, **settings: Any) -> Loader:
    settings = {"seed": 0, "size": 800, "micro_batches": 2, "workers": 2} | settings
    return Loader(shards, Odd(what), **settings)  # type: ignore[arg-type]


def test_a_stalled_worker_is_named_with_what_it_reads(shards: ShardSet) -> None:
    with closing(odd_loader(shards, "stall")) as loader:
        next(loader)  # so that the workers have started
        assert loader.workers
        loader.workers.patience = 2
        with pytest.raises(TimeoutError) as caught:
            list(islice(loader, 10))
    assert str(caught.value).startswith("loader worker ")
    assert str(caught.value).endswith(
        " has produced no batch for 2 s; it is reading "
        f"{shards.root}/series-000001.tar, sample 's1-2'"
    )
    with pytest.raises(StopIteration):
        next(loader)


def test_a_worker_that_died_is_named_with_what_it_read(shards: ShardSet) -> None:
    loader = odd_loader(shards, "die")
    with closing(loader), pytest.raises(ChildProcessError) as caught:
        list(islice(loader, 10))
    assert str(caught.value).endswith(
        " died, possibly out of memory; it was reading "
        f"{shards.root}/series-000001.tar, sample 's1-2'"
    )


def test_a_bug_in_a_worker_comes_with_its_traceback(shards: ShardSet) -> None:
    loader = odd_loader(shards, "bug")
    with closing(loader), pytest.raises(RuntimeError, match="in a loader worker:") as caught:
        list(islice(loader, 10))
    assert "in fit" in str(caught.value) and "KeyError: 'a bug'" in str(caught.value)


def test_an_unexpected_error_of_a_decoder_is_a_bad_sample(shards: ShardSet, tmp_path: Path) -> None:
    """Libraries raise errors of many types for damage that they do not expect."""
    quarantine = Quarantine(tmp_path / "bad", 1.0)
    with closing(odd_loader(shards, "fault", quarantine=quarantine)) as loader:
        assert sum(1 for _ in islice(loader, 10)) == 10
    listed = "".join(file.read_text() for file in tmp_path.iterdir())
    assert "KeyError: 'of a library'; decode in test_workers.py:" in listed and "s1-2" in listed


HANGING = """
from d2v_ds.data.shard_format import open_set
from tests.loader.test_workers import odd_loader
loader = odd_loader(open_set({root!r}), "stall")
next(loader)
print(*loader.workers.pids, flush=True)
while True:
    next(loader)
"""


def test_a_hanging_worker_ends_with_a_killed_trainer(shards: ShardSet) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", HANGING.format(root=str(shards.root))],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.stdout
    workers = [int(pid) for pid in process.stdout.readline().split()]
    time.sleep(1)
    assert len(alive(workers)) == 2
    process.kill()
    process.communicate(timeout=20)
    assert gone(workers)


class Echo:
    """Returns the lot and arrays that depend on it."""

    def __call__(self, lot: int, reading: Any) -> Any:
        reading(lot)
        if lot == 13:
            raise UserError("thirteen")
        return {
            "lot": lot,
            "pid": os.getpid(),
            "environment": dict(os.environ),
            "tensor": torch.full((lot % 5, 1 << (lot % 18)), lot),
            "array": np.arange(lot, dtype=np.int16)[::2],
            "empty": torch.zeros(0, 3),
            "big": torch.arange(3_000_000 if lot == 7 else 3),
        }


def echo(lots: Iterator[int], workers: int) -> LoaderWorkers:
    name = "lot {}".format
    return LoaderWorkers(Echo(), lots, workers, name=name, patience=60.0)


@pytest.mark.parametrize("workers", [1, 3])
def test_items_arrive_complete_and_in_order(workers: int) -> None:
    """Also items much larger than the ones before."""
    with closing(echo(iter(range(14, 1000)), workers)) as made:
        for lot in range(14, 60):
            item = next(made)
            assert item["lot"] == lot
            assert item["tensor"].equal(torch.full((lot % 5, 1 << (lot % 18)), lot))
            assert item["array"].tolist() == list(range(0, lot, 2))
            assert item["empty"].shape == (0, 3)
    with closing(echo(iter(range(1000)), workers)) as made:
        kept = []
        for lot in range(13):
            item = next(made)
            assert item["big"].equal(torch.arange(3_000_000 if lot == 7 else 3))
            kept.append(item["pid"])
        assert len(set(kept)) == workers
        with pytest.raises(UserError, match="thirteen"):
            next(made)


def test_workers_have_the_present_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the environment of the first loader in this process. It contains the path of the cache
    and the credentials of buckets."""
    for value in ("first", "second"):
        monkeypatch.setenv("D2V_CACHE", value)
        with closing(echo(iter(range(1000)), 1)) as made:
            found = next(made)["environment"]
        assert found["D2V_CACHE"] == value and found["OMP_NUM_THREADS"] == "1"
    monkeypatch.delenv("D2V_CACHE")
    with closing(echo(iter(range(1000)), 1)) as made:
        assert "D2V_CACHE" not in next(made)["environment"]


def test_nothing_is_left_open() -> None:
    with closing(echo(iter(range(1000)), 1)) as made:
        next(made)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with closing(echo(iter(range(1000)), 2)) as made:
            next(made)
    del made
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_server_that_was_killed_is_replaced(shards: ShardSet, tmp_path: Path) -> None:
    with closing(odd_loader(shards, "none", workers=1)) as loader:
        next(loader)
        assert loader.workers
        [pid] = loader.workers.pids
        server = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        os.kill(server, signal.SIGKILL)
        with pytest.raises(ChildProcessError, match="died"):
            end = time.monotonic() + 30  # the worker dies a moment after its server
            while time.monotonic() < end:
                next(loader)
    time.sleep(0.2)
    with closing(odd_loader(shards, "none", workers=1)) as loader:
        next(loader)
