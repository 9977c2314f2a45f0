"""The launcher: N ranks on this machine, if neither srun nor torchrun started them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

from d2v_ds.distributed import signals
from d2v_ds.distributed.signals import STOP_SIGNALS

RANK = (sys.executable, "-m", "d2v_ds")  # holds signals itself, as soon as it can


def launch(
    ranks: int,
    arguments: Sequence[str],
    *,
    command: Sequence[str] = RANK,
    failing_grace: float = 3.0,
    stopping_grace: float = 30.0,
) -> int:
    """Runs `command arguments` as ranks 0 .. ranks - 1 on this machine and waits; returns the exit
    code.

    Rank 0 writes to this process's output. If another rank is the first to fail, its last lines are
    shown. SIGTERM, SIGUSR2 and SIGINT are forwarded. If a rank fails, the others have
    `failing_grace` seconds to end, or `stopping_grace` after a stop signal, since they may be
    saving. Then all are killed with the processes that they started, and the exit code is that of
    the first failing rank. No rank outlives this process.
    """
    port = free_port()
    processes: list[subprocess.Popen[bytes]] = []
    stopping: list[int] = list(signals.received)
    starting = signals.blocked if tuple(command) == RANK else contextlib.nullcontext

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
                words = [*command, *arguments]
                with starting():
                    process = start_rank(rank, ranks, port, words, errors[rank])
                processes.append(process)
                if stopping:  # it arrived before this rank was started
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
    return code if code > 0 else 128 - code  # as a shell reports a signal


def free_port() -> int:
    """A free port of this machine."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def start_rank(
    rank: int, ranks: int, port: int, command: Sequence[str], errors: Path | None
) -> subprocess.Popen[bytes]:
    """Starts one rank in its own session, so that Ctrl-C reaches it only once, through the
    launcher. errors: the file for its standard error; None for this process's own output."""
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
    """Linux: this process is killed as soon as its parent ends, for whatever reason."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def wait_for(
    processes: Sequence[subprocess.Popen[bytes]], grace: Callable[[], float]
) -> int | None:
    """Waits for all processes; returns the index of the first that failed, None if none did. After
    a failure the others have `grace()` seconds to end."""
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
    """Kills a rank and the processes that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()
