"""The processes of a conversion: killed, interrupted, lost; and resuming with the same command."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from d2v_ds.data.shard_format import INDEX_FILE, PLAN_FILE
from shards import samples
from shards.cli import main
from shards.workers import AHEAD, MANY, WorkerPool
from tests import ROOT
from tests.helpers.processes import alive

SPEECH = samples.path("speech")


def hashes(folder: Path) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.iterdir())}


needs_proc = pytest.mark.skipif(sys.platform != "linux", reason="looks at processes in /proc")


def children(pid: int) -> list[int]:
    return [int(c) for c in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def start(arguments: list[str], out: Path) -> subprocess.Popen[str]:
    """A running conversion that has finished at least 3 shards."""
    process = subprocess.Popen(
        [sys.executable, "-m", "shards.cli", *arguments],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while len(list(out.glob("speech-??????.json"))) < 3:
        assert process.poll() is None, "it finished before the test could stop it"
        time.sleep(0.002)
    return process


def wait_for_end(workers: list[int]) -> None:
    deadline = time.monotonic() + 10
    while alive(workers):
        assert time.monotonic() < deadline, "workers are still alive"
        time.sleep(0.01)


@needs_proc
def test_killed_and_repeated(tmp_path: Path) -> None:
    out, clean = tmp_path / "out", tmp_path / "clean"
    arguments = ["speech", str(SPEECH / "unseen.tsv"), str(out), "--shard-size", "6KB", "-j2"]
    process = start(arguments, out)
    workers = children(process.pid)
    process.kill()
    process.communicate(timeout=20)
    wait_for_end(workers)
    assert len(workers) >= 2 and not (out / INDEX_FILE).exists() and (out / PLAN_FILE).exists()
    done = {
        r.with_suffix(".tar"): r.with_suffix(".tar").stat() for r in out.glob("speech-??????.json")
    }
    (out / f"speech-000099.tar.{os.uname().nodename}.{workers[0]}.tmp").write_bytes(b"half")
    assert main([*arguments[:-1], "-j1"]) == 0
    assert {tar: tar.stat().st_mtime_ns for tar in done} == {
        tar: stat.st_mtime_ns for tar, stat in done.items()
    }, "finished shards were written again"
    assert main(["speech", str(SPEECH / "unseen.tsv"), str(clean), *arguments[3:5]]) == 0
    assert hashes(out) == hashes(clean)


@needs_proc
def test_ctrl_c_is_one_line(tmp_path: Path) -> None:
    arguments = ["speech", str(SPEECH / "unseen.tsv"), str(tmp_path / "out"), "--shard-size", "6KB"]
    process = start([*arguments, "-j2"], tmp_path / "out")
    workers = children(process.pid)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, error = process.communicate(timeout=20)
    assert process.returncode == 130
    assert error == "d2v-shards: interrupted; run the same command to resume\n"
    wait_for_end(workers)


@needs_proc
@pytest.mark.parametrize("pause", [0.0, 0.3])
def test_ctrl_c_does_not_wait_for_the_work(pause: float) -> None:
    """While workers start (pause 0: some have not reached Python code yet) and while they work."""
    code = (
        "import time; from shards.workers import run_jobs; list(run_jobs(time.sleep, [60, 60], 2))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while len(children(process.pid)) < 3:  # with multiprocessing's resource tracker
        time.sleep(0.002)
    workers = children(process.pid)
    time.sleep(pause)
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=20)
    assert error.count("Traceback") == 1 and error.endswith("KeyboardInterrupt\n"), error
    wait_for_end(workers)


@needs_proc
def test_a_lost_worker_is_one_line(tmp_path: Path) -> None:
    arguments = ["speech", str(SPEECH / "unseen.tsv"), str(tmp_path / "out"), "--shard-size", "6KB"]
    process = start([*arguments, "-j2"], tmp_path / "out")
    workers = children(process.pid)
    os.kill(workers[-1], signal.SIGKILL)
    _, error = process.communicate(timeout=20)
    assert process.returncode == 1
    assert "a worker process died" in error and error.count("\n") == 1
    wait_for_end(workers)


@pytest.mark.parametrize("processes", [1, 2])
def test_jobs_are_created_on_demand(processes: int) -> None:
    """The jobs of a plan with millions of inputs are not all made at once."""
    taken = []

    def jobs() -> Iterator[int]:
        for i in range(1000):
            taken.append(i)
            yield -i

    with WorkerPool(processes) as workers:
        results = workers.run(abs, jobs(), 1000)
        for done in range(1, 20):
            next(results)
            assert len(taken) <= done + 2 * AHEAD * processes
        results.close()


@needs_proc
def test_processes_start_while_many_inputs_are_read() -> None:
    before = children(os.getpid())
    with WorkerPool(2) as workers:
        items = workers.start_in_time(range(2 * MANY), "colorsys")
        assert [next(items) for _ in range(MANY - 1)] == list(range(MANY - 1))
        assert children(os.getpid()) == before, "no processes for few inputs"
        assert next(items) == MANY - 1
        started = set(children(os.getpid())) - set(before)
        assert len(started) >= 2
        assert list(items) == list(range(MANY, 2 * MANY))
        assert sorted(workers.run(abs, [-1, -2, -3], 3)) == [1, 2, 3]
        assert started <= set(children(os.getpid())), "the started processes are used"
        assert any("colorsys" in names for names in workers.run(loaded, [0.1] * 8, 8))
    with WorkerPool(1) as workers:
        assert len(list(workers.start_in_time(range(2 * MANY), "colorsys"))) == 2 * MANY
        assert [*workers.run(abs, [-1, -2], 2)] == [1, 2]
    wait_for_end([pid for pid in alive(started) if "tracker" not in command_of(pid)])


def loaded(seconds: float) -> list[str]:
    """Sleeps, so that every process gets a job."""
    time.sleep(seconds)
    return sorted(sys.modules)


def command_of(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text()
