"""A pool of ranks for tests: processes that start once and run functions sent to them.

    run_ranks(2, function, *arguments) -> [result on rank 0, result on rank 1]

Importing torch and DeepSpeed takes longer than most tests, so the processes stay. A function is
sent by its import path (so it is a module-level one) with pickled arguments, runs on ranks
0 .. n - 1 inside a fresh process group of that size, and its results come back. Where a rank
raises, dies or does not answer, the test fails with that rank's traceback, and the pool starts
anew for the next one.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

START_SECONDS = 120.0


class RankError(AssertionError):
    """A function did not end well on some rank; the message holds its traceback."""


class Pool:
    """Up to `size` ranks, started at the first call."""

    def __init__(self, size: int = 4) -> None:
        self._size = size
        self._connections: list[Connection] = []
        self._processes: list[Any] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._calls = 0

    def run(
        self, ranks: int, function: Callable[..., Any], *args: Any, timeout: float = 120
    ) -> Any:
        """What `function(*args)` returned on each of `ranks` ranks."""
        assert 1 <= ranks <= self._size
        if self._folder is None:
            self._folder = self._start()
        self._calls += 1
        store = str(Path(self._folder.name, str(self._calls)))
        message = pickle.dumps((ranks, store, function, args))
        connections = self._connections[:ranks]
        for connection in connections:
            connection.send_bytes(message)
        try:
            return self._collect(connections, function.__name__, timeout)
        except BaseException:  # the ranks may be anywhere in the function
            self.stop()
            raise

    def _collect(self, connections: list[Connection], name: str, timeout: float) -> list[Any]:
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        deadline = time.monotonic() + timeout
        while len(results) + len(failures) < len(connections):
            pending = [
                c for r, c in enumerate(connections) if r not in results and r not in failures
            ]
            ready = wait(pending, timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                silent = [r for r, c in enumerate(connections) if c in pending]
                failures |= {r: f"rank {r} gave no answer within {timeout:g} s" for r in silent}
                break
            for connection in ready:
                rank = connections.index(connection)
                try:
                    good, value = pickle.loads(connection.recv_bytes())
                except EOFError:
                    self._processes[rank].join(5)
                    good, value = False, f"it died, exit code {self._processes[rank].exitcode}"
                if good:
                    results[rank] = value
                else:
                    failures[rank] = f"rank {rank}: {value}"
                    deadline = min(deadline, time.monotonic() + 5)  # the others may wait for it
        if failures:
            raise RankError(f"{name} failed\n" + "\n".join(failures.values()))
        return [results[rank] for rank in range(len(connections))]

    def _start(self) -> tempfile.TemporaryDirectory[str]:
        context = multiprocessing.get_context("spawn")
        before = dict(os.environ)
        os.environ.update(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="")
        try:
            for rank in range(self._size):
                ours, theirs = context.Pipe()
                process = context.Process(target=serve, args=(theirs, rank), daemon=True)
                process.start()
                theirs.close()  # so that its death is seen here
                self._connections.append(ours)
                self._processes.append(process)
        finally:
            os.environ.clear()
            os.environ.update(before)
        self._collect(self._connections, "starting the ranks", START_SECONDS)
        return tempfile.TemporaryDirectory()  # where the ranks of each call meet

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        for connection in self._connections:
            connection.close()
        self._processes, self._connections = [], []
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None


def serve(connection: Connection, rank: int) -> None:
    """The life of one rank: functions come in, results or tracebacks go out."""
    import torch

    from d2v_ds.distributed import die_with_parent

    if sys.platform == "linux":
        die_with_parent()
    torch.set_num_threads(1)
    import deepspeed  # noqa: F401  # once, for all functions

    connection.send_bytes(pickle.dumps((True, None)))
    while True:
        try:
            ranks, store, function, args = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        join_group(rank, ranks, store)
        try:
            answer = pickle.dumps((True, function(*args)))
        except BaseException:
            answer = pickle.dumps((False, traceback.format_exc()))
        gc.collect()  # engines hold themselves in cycles; their hooks and buffers go with them
        connection.send_bytes(answer)


def join_group(rank: int, ranks: int, store: str) -> None:
    """A fresh process group of the first `ranks` ranks, and DeepSpeed as if just imported."""
    import deepspeed.comm.comm
    import torch.distributed as dist
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
    from deepspeed.runtime.zero.partition_parameters import Init

    if dist.is_initialized():
        if deepspeed.comm.comm.cdb is not None:
            deepspeed.comm.destroy_process_group()
            deepspeed.comm.comm.cdb = None
        else:
            dist.destroy_process_group()
    # stage 3 numbers modules and parameters from the first engine of a process on, and compares
    # the numbers of different ranks
    DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__[0][0] = 0
    Init.param_id = 0
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
    dist.init_process_group("gloo", store=dist.FileStore(store, ranks), rank=rank, world_size=ranks)
