"""Ranks: who this process is, how processes meet, how they agree to stop, how they are started.

    environment (srun, torchrun, `launch`, or nothing) -> World -> init() -> torch.distributed
    SIGTERM, SIGUSR2, SIGINT or a file STOP -> StopFlag.agreed(), the same on all ranks

Knows torch.distributed and nothing of the training.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore, Store, TCPStore

from d2v_ds.errors import UserError

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)


@dataclass(frozen=True)
class World:
    """This process among those of the run."""

    rank: int = 0
    local_rank: int = 0  # on this machine: the GPU to take
    size: int = 1
    address: str = ""  # host and port where rank 0 listens; empty for a single process
    port: int = 0
    key: str = ""  # of a step that srun started: what its ranks know each other by

    @staticmethod
    def from_environment(environ: Mapping[str, str] | None = None) -> World:
        """From torchrun's variables (`launch` and deepspeed set the same), else from srun's, else
        alone. Raises UserError for variables that do not make sense together."""
        env = os.environ if environ is None else environ
        if "RANK" in env and "WORLD_SIZE" in env:
            rank, local_rank, size = "RANK", "LOCAL_RANK", "WORLD_SIZE"
            address, port, key = "127.0.0.1", 29500, ""
        elif "SLURM_STEP_NUM_TASKS" in env:  # set by srun alone: a batch script is one process
            rank, local_rank, size = "SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS"
            address = first_host(env.get("SLURM_STEP_NODELIST", "127.0.0.1"))
            names = ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_STEP_ID")
            key = ".".join(env.get(name, "0") for name in names)
            port = port_of(key)
        else:
            return World()
        world = World(
            rank=_number(env, rank),
            local_rank=_number(env, local_rank, 0),
            size=_number(env, size),
            address=env.get("MASTER_ADDR", address),
            port=_number(env, "MASTER_PORT", port),
            key=key,
        )
        if not 0 <= world.rank < world.size:
            raise UserError(f"{rank}={world.rank} does not lie in 0 .. {size}={world.size} - 1")
        return world


def _number(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = env.get(name, "" if default is None else str(default))
    if not text.isdecimal():
        raise UserError(f"{name}: expected a whole number in the environment, got {text!r}")
    return int(text)


def first_host(nodelist: str) -> str:
    """The first host of Slurm's compressed list: node[003-007,9],other -> node003."""
    first = re.split(r",(?![^\[]*\])", nodelist)[0]
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first)


def port_of(key: str, attempt: int = 0) -> int:
    """A port for the holder of `key`, below those that systems hand out by themselves."""
    return 20000 + stable_hash(key, attempt) % 10000


MEETING = timedelta(seconds=300)  # within which all ranks must have started
PORTS = 8  # tried in turn: something else may listen on the first


def meet(world: World) -> Store:
    """The store of this step's ranks; no two steps ever share one.

    Rank 0 opens it on a port that the system picks, and tells the port and the step's key to
    whoever asks on the first free of PORTS ports that all ranks know. Raises UserError when none of
    them is free, RuntimeError when rank 0 is not found.
    """
    ports = [world.port, *(port_of(world.key, attempt) for attempt in range(1, PORTS))]
    if world.rank == 0:
        listener = _first_free(world, ports)
        store = TCPStore(world.address, 0, None, True, MEETING, wait_for_workers=False)
        greeting = f"d2v_ds {world.key} {store.port}\n".encode()
        threading.Thread(target=_greet, args=(listener, greeting), daemon=True).start()
        return store
    deadline = time.monotonic() + MEETING.total_seconds()
    while time.monotonic() < deadline:
        for port in ports:
            found = _ask(world, port)
            if found:
                return TCPStore(world.address, found, None, False, MEETING, wait_for_workers=False)
        time.sleep(0.2)
    raise RuntimeError(f"rank 0 was not found on {world.address}, ports {ports}, in {MEETING}")


def _first_free(world: World, ports: Sequence[int]) -> socket.socket:
    for port in ports:
        with contextlib.suppress(OSError):  # it is taken
            return socket.create_server(("", port))
    raise UserError(f"none of the ports {ports} is free on {world.address}; set MASTER_PORT")


def _greet(listener: socket.socket, greeting: bytes) -> None:
    """Tells everyone who asks; those of other jobs go on to the next port."""
    while True:
        with contextlib.suppress(OSError), listener.accept()[0] as asker:
            asker.sendall(greeting)


def _ask(world: World, port: int) -> int | None:
    """The port of our store, if our rank 0 answers on `port`."""
    try:
        with socket.create_connection((world.address, port), timeout=5) as asked:
            name, key, store_port = asked.makefile("rb").readline(200).decode().split()
    except (OSError, ValueError):  # nobody, or somebody who says something else, or nothing
        return None
    return int(store_port) if (name, key) == ("d2v_ds", world.key) else None


def init(world: World, device: torch.device) -> None:
    """The process group of all ranks: gloo for tensors on the host, NCCL for those on a GPU. A
    single process needs neither a launcher nor a network."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # DeepSpeed and other libraries read these
    os.environ.update(
        RANK=str(world.rank), LOCAL_RANK=str(world.local_rank), WORLD_SIZE=str(world.size)
    )
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if world.size == 1:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
        return
    os.environ.update(MASTER_ADDR=world.address, MASTER_PORT=str(world.port))
    store = PrefixStore("ranks", meet(world)) if world.key else None  # None: the launcher's
    dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size)


def shutdown() -> None:
    """Leaves the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    """Waits for all ranks, on the host."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(torch.zeros(1))


def sums_right(device: torch.device, seconds: float = 30.0) -> bool:
    """Whether an all-reduce over all ranks gives what it should, in time. All ranks together."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return True
    ranks = dist.get_world_size()
    values = torch.arange(4096, dtype=torch.float64, device=device) % 97
    total = values * (dist.get_rank() + 1)
    work = dist.all_reduce(total, async_op=True)
    deadline = time.monotonic() + seconds
    while not work.is_completed():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.001)
    work.wait()
    return bool(torch.equal(total, values * (ranks * (ranks + 1) // 2)))


class RankSums:
    """Adds numbers up over the ranks, on the host, while the ranks do other things. Made, and begun
    each time, by all ranks together; of one rank, nothing is sent."""

    def __init__(self, world: int) -> None:
        self._group: Any = None
        if world > 1:
            self._group = dist.new_group(backend="gloo")  # never waits for a GPU, or for others

    def begin(self, *numbers: float) -> Callable[[], list[float]]:
        """The sums, when called; whole numbers below 2**53 are exact."""
        if self._group is None:
            return lambda: list(numbers)
        totals = torch.tensor(numbers, dtype=torch.float64)
        work = dist.all_reduce(totals, group=self._group, async_op=True)

        def sums() -> list[float]:
            work.wait()
            return [float(total) for total in totals]

        return sums


def cores_of_rank() -> int:
    """Cores that this rank has for itself: what srun gave, else its share of this machine's."""
    cores = len(os.sched_getaffinity(0))
    if "SLURM_STEP_NUM_TASKS" in os.environ:  # where srun binds nobody, all see all cores
        return min(cores, int(os.environ.get("SLURM_CPUS_PER_TASK", cores)))
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


# -------------------------------------------------------------------------------------- seeding


def stable_hash(*parts: int | str) -> int:
    """A 63-bit hash that is the same in every process and on every machine."""
    text = "/".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def seed_torch(seed: int, step: int, micro_batch: int) -> None:
    """Dropout and noise of one micro-batch, by its index among all of its step: they do not depend
    on the ranks, and no generator state needs saving."""
    torch.manual_seed(stable_hash(seed, step, micro_batch))


# ------------------------------------------------------------------------------------- stopping


class StopFlag:
    """Whether the run should stop after this step: a signal to any rank, or a file STOP in the run
    folder. A context manager: signals only set the flag inside, and do what they did before again
    afterwards. Entered by all ranks together, after `init`."""

    def __init__(self, run_dir: Path | None = None) -> None:
        self.reason = ""  # on this rank: the signal's name, or the file
        logs = os.environ.get("D2V_JOB_LOGS")  # of a batch script, which asks there
        self._files = [Path(run_dir, "STOP")] if run_dir else []
        self._files += [Path(logs, "stop")] if logs else []
        self._before: dict[signal.Signals, Any] = {}
        self._group: Any = None

    def __enter__(self) -> StopFlag:
        if dist.is_initialized() and dist.get_world_size() > 1:
            self._group = dist.new_group(backend="gloo")  # never waits for a GPU, or for others
        self._before = {number: signal.signal(number, self._set) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _set(self, number: int, frame: FrameType | None) -> None:
        self.reason = signal.Signals(number).name

    def agreed(self) -> bool:
        """True on all ranks as soon as one of them was told to stop. All ranks call it together."""
        on_rank_0 = not dist.is_initialized() or dist.get_rank() == 0
        if on_rank_0 and not self.reason:  # one rank asks the file system
            self.reason = next((str(file) for file in self._files if file.exists()), "")
        if self._group is None:
            return bool(self.reason)
        flag = torch.tensor([int(bool(self.reason))])
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group)
        return bool(flag.item())


# ------------------------------------------------------------------------------------- starting


def launch(
    ranks: int,
    arguments: Sequence[str],
    *,
    command: Sequence[str] = (sys.executable, "-m", "d2v_ds"),
    failing_grace: float = 3.0,
    stopping_grace: float = 30.0,
) -> int:
    """Runs `command arguments` as ranks 0 .. ranks - 1 on this machine and waits; its exit code.

    Rank 0 writes to this process's output; of the others the last lines of the first that failed
    are shown. SIGTERM, SIGUSR2 and SIGINT are passed on. When a rank fails the others have
    `failing_grace` seconds to end by themselves, or `stopping_grace` after a stop signal, since
    they may be saving; then all are killed, with the processes that they started, and the exit
    code is that of the first failing rank. None outlives this process.
    """
    port = free_port()
    processes: list[subprocess.Popen[bytes]] = []
    stopping: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        stopping.append(number)
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    before = {number: signal.signal(number, forward) for number in STOP_SIGNALS}
    with tempfile.TemporaryDirectory() as folder:
        errors = [None, *(Path(folder, f"rank{rank}") for rank in range(1, ranks))]
        try:
            for rank in range(ranks):
                processes.append(
                    start_rank(rank, ranks, port, [*command, *arguments], errors[rank])
                )
                if stopping:  # it came before this rank could be told
                    processes[-1].send_signal(stopping[-1])
            failed = wait_for(processes, lambda: stopping_grace if stopping else failing_grace)
        finally:
            for process in processes:
                kill_group(process)
            for number, handler in before.items():
                signal.signal(number, handler)
        if failed is None:
            return 0
        if (path := errors[failed]) is not None:
            tail = path.read_bytes()[-4000:].decode(errors="replace").rstrip()
            print(f"rank {failed} failed:\n{tail}", file=sys.stderr)
    code: int = processes[failed].returncode
    return code if code > 0 else 128 - code  # as a shell says that a signal ended it


def free_port() -> int:
    """A port of this machine that nothing listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def start_rank(
    rank: int, ranks: int, port: int, command: Sequence[str], errors: Path | None
) -> subprocess.Popen[bytes]:
    """One rank in a session of its own, so that a terminal's Ctrl-C reaches it once, through the
    launcher; errors: where its standard error goes, None for this process's own output."""
    environment = {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    with open(errors or os.devnull, "wb") as file:
        return subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=None if errors is None else subprocess.DEVNULL,
            stderr=None if errors is None else file,
            start_new_session=True,
            preexec_fn=die_with_parent if sys.platform == "linux" else None,
        )


LIBC = ctypes.CDLL(None)
PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Linux: this process is killed as soon as the one that started it ends, however it ends."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def wait_for(
    processes: Sequence[subprocess.Popen[bytes]], grace: Callable[[], float]
) -> int | None:
    """The first process that failed, None when all ended well. After a failure the others have
    `grace()` seconds to end."""
    failed, since = None, 0.0
    while True:
        codes = [process.poll() for process in processes]
        if failed is None and any(codes):
            failed = next(rank for rank, code in enumerate(codes) if code)
            since = time.monotonic()
        ended = None not in codes
        if ended or (failed is not None and time.monotonic() - since > grace()):
            return failed
        time.sleep(0.05)


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kills a rank and whatever it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()
