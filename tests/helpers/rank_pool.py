"""A pool of ranks for tests: processes that start once and run functions sent to them.

    run_ranks(2, function, *arguments) -> [result on rank 0, result on rank 1]

Importing torch and DeepSpeed takes longer than most tests, so the processes are reused. Each number
of ranks has its own set of processes, with one process group for the lifetime of the set: when a
process destroyed its group and formed another, messages were mixed up. A function is sent by its
import path and must be defined at module level. Its arguments and results are pickled. If a rank
raises, dies or does not answer, the test fails with that rank's traceback, and the next test starts
a new set.
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
GRACE_SECONDS = 5.0  # for the other ranks to answer after one has failed


class RankError(AssertionError):
    """A function failed on at least one rank; the message contains the traceback."""


class Pool:
    """Sets of ranks by number of ranks, each started on first use."""

    def __init__(self) -> None:
        self._sets: dict[int, Ranks] = {}

    def run(
        self, ranks: int, function: Callable[..., Any], *args: Any, timeout: float = 120
    ) -> list[Any]:
        """Returns the results of `function(*args)` by rank. Fails after `timeout` seconds."""
        if ranks not in self._sets:
            self._sets[ranks] = Ranks(ranks)
        try:
            return self._sets[ranks].run(function, args, timeout)
        except BaseException:  # the ranks may still be inside the function
            self._sets.pop(ranks).stop()
            raise

    def stop(self) -> None:
        while self._sets:
            self._sets.popitem()[1].stop()


class Ranks:
    """Processes that form one process group."""

    def __init__(self, size: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        self._connections: list[Connection] = []
        self._processes: list[Any] = []
        self._started = False
        before = dict(os.environ)
        os.environ.update(
            OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="", LOCAL_RANK="0"
        )
        try:
            for rank in range(size):
                ours, theirs = context.Pipe()
                store = str(Path(self._folder.name, "store"))
                process = context.Process(
                    target=serve, args=(theirs, rank, size, store), daemon=True
                )
                process.start()
                theirs.close()  # so that this process sees the rank's death as EOF
                self._connections.append(ours)
                self._processes.append(process)
        finally:
            os.environ.clear()
            os.environ.update(before)

    def run(self, function: Callable[..., Any], args: tuple[Any, ...], timeout: float) -> list[Any]:
        message = pickle.dumps((function, args))
        if not self._started:
            self._collect("the start", START_SECONDS)
            self._started = True
        for connection in self._connections:
            connection.send_bytes(message)
        return self._collect(function.__name__, timeout)

    def _collect(self, name: str, timeout: float) -> list[Any]:
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        start = time.monotonic()
        deadline = start + timeout
        while pending := {
            c: r for r, c in enumerate(self._connections) if r not in results and r not in failures
        }:
            ready = wait(list(pending), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                waited = time.monotonic() - start
                for rank in pending.values():
                    failures[rank] = f"rank {rank} gave no answer within {waited:.0f} s"
            for connection in ready:
                rank = pending[connection]  # type: ignore[index]
                try:
                    good, value = pickle.loads(connection.recv_bytes())  # type: ignore[union-attr]
                except EOFError:
                    self._processes[rank].join(GRACE_SECONDS)
                    good, value = False, f"it died, exit code {self._processes[rank].exitcode}"
                if good:
                    results[rank] = value
                else:
                    failures[rank] = f"rank {rank}: {value}"
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        if failures:
            raise RankError(f"{name} failed\n" + "\n".join(failures.values()))
        return [results[rank] for rank in sorted(results)]

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        for connection in self._connections:
            connection.close()
        self._folder.cleanup()


def serve(connection: Connection, rank: int, size: int, store: str) -> None:
    """The main loop of one rank: receives functions, sends back results or tracebacks."""
    from d2v_ds.distributed.launcher import die_with_parent

    if sys.platform == "linux":
        die_with_parent()
    import torch
    import torch.distributed as dist
    from deepspeed.utils import groups  # imports deepspeed once, for all functions

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size))
    dist.init_process_group("gloo", store=dist.FileStore(store, size), rank=rank, world_size=size)
    connection.send_bytes(pickle.dumps((True, None)))
    while True:
        try:
            function, args = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        try:
            answer = pickle.dumps((True, function(*args)))
        except BaseException:
            answer = pickle.dumps((False, traceback.format_exc()))
        gc.collect()  # engines are in reference cycles; frees their hooks and buffers
        groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None  # else later engines partition in two levels
        connection.send_bytes(answer)
