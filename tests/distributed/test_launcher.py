"""The local launcher: output, failures and signals of its ranks."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from d2v_ds.distributed.launcher import launch
from tests.helpers.processes import alive


def rank_script(folder: Path, body: str) -> tuple[str, ...]:
    """The command of a rank that runs `body` with variables `rank` and `folder`, without torch."""
    script = folder / "rank.py"
    script.write_text(
        "import os, pathlib, signal, subprocess, sys, time\n"
        "rank = int(os.environ['RANK'])\n"
        f"folder = pathlib.Path({str(folder)!r})\n" + textwrap.dedent(body)
    )
    return (sys.executable, str(script))


def wait_until(condition: Callable[[], Any], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.02)


def test_launched_ranks_form_a_group(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command = rank_script(
        tmp_path,
        """
        import torch
        import torch.distributed as dist
        from d2v_ds.distributed.world import World
        from d2v_ds.distributed.process_group import init, shutdown
        world = World.from_environment()
        init(world, torch.device("cpu"))
        total = torch.tensor([world.rank + 1])
        dist.all_reduce(total)
        print(world.rank, world.local_rank, world.size, total.item(), sys.argv[1:])
        shutdown()
        """,
    )
    assert launch(2, ["train", "x=1"], command=command) == 0
    assert capfd.readouterr().out == "0 0 2 3 ['train', 'x=1']\n"  # only from rank 0


def test_a_failing_rank_stops_all(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command = rank_script(
        tmp_path,
        """
        if rank == 1:
            print("no such file", file=sys.stderr)
            sys.exit(2)
        child = subprocess.Popen(["sleep", "60"])
        (folder / f"pid{rank}").write_text(f"{os.getpid()} {child.pid}")
        time.sleep(60)
        """,
    )
    start = time.monotonic()
    assert launch(3, [], command=command, failing_grace=1.0) == 2
    assert time.monotonic() - start < 10
    assert capfd.readouterr().err == "rank 1 failed:\nno such file\n"
    pids = [int(p) for r in (0, 2) for p in (tmp_path / f"pid{r}").read_text().split()]
    wait_until(lambda: not alive(pids))  # loader workers too


def test_rank_0_reports_its_own_error_and_a_signal_has_a_code(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    command = rank_script(tmp_path, "print('bad', file=sys.stderr); sys.exit(1)")
    assert launch(1, [], command=command) == 1
    assert capfd.readouterr().err == "bad\n"
    command = rank_script(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)")
    assert launch(1, [], command=command) == 128 + 9


LAUNCHER = """
import sys
from d2v_ds.distributed.launcher import launch
from tests.helpers.processes import alive
sys.exit(launch(2, [], command=sys.argv[1:], stopping_grace=1.5))
"""


def start_launcher(command: tuple[str, ...], folder: Path) -> subprocess.Popen[bytes]:
    process = subprocess.Popen([sys.executable, "-c", LAUNCHER, *command])
    wait_until(lambda: (folder / "ready0").exists() and (folder / "ready1").exists())
    return process


SAVING = """
    received = []
    for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT):
        signal.signal(number, lambda number, frame: received.append(number))
    (folder / f"ready{rank}").write_text(str(os.getpid()))
    while not received:
        time.sleep(0.01)
    time.sleep(SECONDS)
    (folder / f"saved{rank}").write_text(str(received))
    sys.exit(CODE)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2, signal.SIGINT])
def test_signals_are_forwarded_and_saving_ranks_finish(
    tmp_path: Path, number: signal.Signals
) -> None:
    body = SAVING.replace("SECONDS", "0.3 * rank").replace("CODE", "0")
    process = start_launcher(rank_script(tmp_path, body), tmp_path)
    process.send_signal(number)
    assert process.wait(20) == 0
    for rank in (0, 1):
        assert (tmp_path / f"saved{rank}").read_text() == str([int(number)])


def test_after_a_stop_other_ranks_may_save_although_one_fails(tmp_path: Path) -> None:
    body = SAVING.replace("SECONDS", "0.7 if rank == 0 else 0").replace("CODE", "3 * rank")
    process = start_launcher(rank_script(tmp_path, body), tmp_path)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 3
    assert (tmp_path / "saved0").exists()


def test_ranks_do_not_outlive_a_killed_launcher(tmp_path: Path) -> None:
    body = "(folder / f'ready{rank}').write_text(str(os.getpid())); time.sleep(60)"
    process = start_launcher(rank_script(tmp_path, body), tmp_path)
    wait_until(lambda: all((tmp_path / f"ready{r}").read_text() for r in (0, 1)))
    pids = [int((tmp_path / f"ready{r}").read_text()) for r in (0, 1)]
    assert alive(pids) == pids
    process.kill()
    process.wait()
    wait_until(lambda: not alive(pids))
