"""Distributed setup: ranks from the environment, seeds, stopping, the process group, launching."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from d2v_ds.distributed.collectives import barrier
from d2v_ds.distributed.launcher import launch
from d2v_ds.distributed.process_group import init, shutdown
from d2v_ds.distributed.stop import StopFlag
from d2v_ds.distributed.world import World, first_host
from d2v_ds.errors import UserError
from d2v_ds.seeding import seed_torch, stable_hash

RunRanks = Callable[..., list[Any]]

# -------------------------------------------------------------------------------------- ranks


def test_world_of_a_single_process() -> None:
    assert World.from_environment({}) == World(rank=0, local_rank=0, size=1)
    # a batch script also has these variables but is a single process
    assert World.from_environment({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}).size == 1


def test_torchrun_takes_precedence_over_slurm() -> None:
    env = {
        "RANK": "5",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "8",
        "MASTER_ADDR": "node1",
        "MASTER_PORT": "1234",
        "SLURM_PROCID": "2",
        "SLURM_STEP_NUM_TASKS": "4",
    }
    assert World.from_environment(env) == World(5, 1, 8, "node1", 1234)


def test_world_of_srun() -> None:
    env = {
        "SLURM_PROCID": "3",
        "SLURM_LOCALID": "1",
        "SLURM_NTASKS": "4",
        "SLURM_STEP_NUM_TASKS": "4",
        "SLURM_STEP_NODELIST": "gpu[003-004]",
        "SLURM_JOB_ID": "77",
        "SLURM_STEP_ID": "0",
    }
    world = World.from_environment(env)
    assert (world.rank, world.local_rank, world.size, world.address) == (3, 1, 4, "gpu003")
    assert 20000 <= world.port < 30000
    assert world.port == World.from_environment({**env, "SLURM_PROCID": "0"}).port
    assert world.port != World.from_environment({**env, "SLURM_STEP_ID": "1"}).port
    own = World.from_environment({**env, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "9"})
    assert (own.address, own.port) == ("10.0.0.1", 9)


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"RANK": "x", "WORLD_SIZE": "2"}, r"RANK: expected an integer .*'x'"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, r"RANK=2 is not in 0 \.\. WORLD_SIZE=2 - 1"),
        ({"SLURM_STEP_NUM_TASKS": "2"}, r"SLURM_PROCID: expected an integer .*''"),
    ],
)
def test_an_inconsistent_environment(env: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        World.from_environment(env)


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("node[003-007,9],other", "node003"),
        ("node[9,3-4]", "node9"),
        ("rack[1-2]n[04-05]-ib", "rack1n04-ib"),
        ("a-b1,c[1-2]", "a-b1"),
    ],
)
def test_first_host(nodelist: str, host: str) -> None:
    assert first_host(nodelist) == host


# ------------------------------------------------------------------------------------- seeding


def test_stable_hash_is_the_same_everywhere_and_distinguishes_parts() -> None:
    assert stable_hash(0, 1, 2) == 3662037204992188296
    assert len({stable_hash(*p) for p in [(1, 23), (12, 3), (123,), ("1/23",)]}) >= 3
    assert all(0 <= stable_hash(i) < 2**63 for i in range(100))


def test_seeds_distinguish_seed_step_and_micro_batch() -> None:
    drawn = set()
    for triple in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]:
        seed_torch(*triple)
        first = torch.rand(3)
        seed_torch(*triple)
        assert torch.equal(first, torch.rand(3))
        drawn.add(first.sum().item())
    assert len(drawn) == 4


# ------------------------------------------------------------------------------------ stopping


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2, signal.SIGINT])
def test_a_signal_only_sets_the_flag(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopFlag() as stop:
        assert not stop.agreed()
        os.kill(os.getpid(), number)
        assert stop.agreed() and stop.reason == number.name
    assert signal.getsignal(number) == before


def test_a_file_stops(tmp_path: Path) -> None:
    with StopFlag(tmp_path) as stop:
        assert not stop.agreed()
        (tmp_path / "STOP").touch()
        assert stop.agreed() and stop.reason == str(tmp_path / "STOP")


def stop_on(rank: int, folder: Path | None) -> list[bool]:
    with StopFlag(folder) as stop:
        answers = [stop.agreed()]
        if dist.get_rank() == rank:
            if folder is None:
                os.kill(os.getpid(), signal.SIGUSR2)
            else:
                (folder / "STOP").touch()
        barrier()
        return [*answers, stop.agreed()]


def test_all_ranks_agree(run_ranks: RunRanks, tmp_path: Path) -> None:
    assert run_ranks(2, stop_on, 1, None) == [[False, True]] * 2
    assert run_ranks(2, stop_on, 1, tmp_path) == [[False, True]] * 2
    assert run_ranks(2, stop_on, 5, None) == [[False, False]] * 2


# ------------------------------------------------------------------------------- process group


def test_a_single_process_needs_no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # so that monkeypatch undoes what `init` sets
        monkeypatch.delenv(name)
    barrier()  # nothing to wait for yet
    init(World.from_environment(), torch.device("cpu"))
    try:
        tensor = torch.ones(2)
        dist.all_reduce(tensor)
        barrier()
        assert tensor.tolist() == [1, 1] and os.environ["LOCAL_RANK"] == "0"
    finally:
        shutdown()
    shutdown()  # a second call does nothing
    assert not dist.is_initialized()


# ------------------------------------------------------------------------------------ launching


def rank_script(folder: Path, body: str) -> tuple[str, ...]:
    """The command of a rank that runs `body` with variables `rank` and `folder`, without torch."""
    script = folder / "rank.py"
    script.write_text(
        "import os, pathlib, signal, subprocess, sys, time\n"
        "rank = int(os.environ['RANK'])\n"
        f"folder = pathlib.Path({str(folder)!r})\n" + textwrap.dedent(body)
    )
    return (sys.executable, str(script))


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


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
    wait_until(lambda: not any(alive(pid) for pid in pids))  # loader workers too


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
    assert all(alive(pid) for pid in pids)
    process.kill()
    process.wait()
    wait_until(lambda: not any(alive(pid) for pid in pids))
