"""Worker processes: jobs -> results in the order of completion.

A job does not depend on the process that runs it, so any number of processes gives the same
results.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from importlib import import_module
from itertools import islice
from multiprocessing import active_children, get_context
from multiprocessing.process import BaseProcess
from typing import TypeVar

Item = TypeVar("Item")
Job = TypeVar("Job")
Result = TypeVar("Result")

AHEAD = 3  # queued jobs per process, so that no process is idle
MANY = 1_000  # items; for fewer, starting processes (0.2 s) takes longer than it saves
EARLY = 8  # processes that start before the number of jobs is known


class WorkerDied(ChildProcessError):
    """processes: the ids of those that died by themselves, as far as that is known."""

    def __init__(self, processes: Sequence[int] = (), inputs: Sequence[str] = ()) -> None:
        self.processes = processes
        read, leave = "", ""
        if inputs:
            read = f" while it read {' or '.join(inputs)}"
            leave = ", or leave the file out with --except"
        super().__init__(
            f"a worker process died{read}, possibly because the machine ran out of memory. To "
            f"resume, run the same command with fewer --jobs{leave}"
        )


class WorkerPool:
    """Up to `processes` processes, which live until the context ends.

    Processes are spawned, not forked, because libraries hold locks and threads. They die with this
    process, even if it is killed.
    """

    def __init__(self, processes: int) -> None:
        self.processes = processes
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)

    def start_in_time(self, items: Iterable[Item], module: str) -> Iterator[Item]:
        """Yields the same items. If there are many, processes start in the meantime and import a
        module."""
        for number, item in enumerate(items, 1):
            if number == MANY and self.processes > 1:
                with _worker_start():
                    for _ in range(min(self.processes, EARLY)):
                        self._started().submit(_import, module)
            yield item

    def run(
        self, work: Callable[[Job], Result], jobs: Iterable[Job], number: int
    ) -> Iterator[Result]:
        """Yields `work(job)` for `number` jobs in the order of completion. A single job, or a pool
        of one process, runs in this process. Only a few jobs are queued in advance."""
        processes = min(self.processes, number)
        if processes <= 1:
            yield from map(work, jobs)
            return
        pool, rest = self._started(), iter(jobs)

        def submit(most: int) -> set[Future[Result]]:
            with _worker_start():  # each may start a process
                return {pool.submit(work, job) for job in islice(rest, most)}

        workers: set[BaseProcess] = set()
        try:
            running = submit(AHEAD * processes)
            while running:
                workers.update(active_children())
                done, running = wait(running, return_when=FIRST_COMPLETED)
                running |= submit(len(done))
                for future in done:
                    yield future.result()
        except BrokenProcessPool:
            # The pool ends the others with SIGTERM.
            ended = [p.pid for p in workers if p.exitcode not in (None, 0, -signal.SIGTERM)]
            raise WorkerDied([pid for pid in ended if pid]) from None

    def _started(self) -> ProcessPoolExecutor:
        self._pool = self._pool or ProcessPoolExecutor(
            self.processes,
            mp_context=get_context("spawn"),
            initializer=_enter_worker,
            initargs=(os.getpid(),),
        )
        return self._pool


def _import(module: str) -> None:
    import_module(module)


def run_jobs(
    work: Callable[[Job], Result], jobs: Sequence[Job], processes: int
) -> Iterator[Result]:
    """WorkerPool.run, with a pool for these jobs."""
    with WorkerPool(processes) as pool:
        yield from pool.run(work, jobs, len(jobs))


@contextmanager
def _worker_start() -> Iterator[None]:
    """Processes that start in this context use one thread in BLAS and OpenMP, and ignore Ctrl-C
    until _enter_worker."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update({name: "1" for name in names})
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _enter_worker(parent: int) -> None:
    """Runs in a worker. Ctrl-C ends the worker without a traceback, and it dies with its parent."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # the parent died before prctl
            os._exit(1)
