"""Worker processes: jobs in -> results as they come, with every way to end thought of.

Nothing of a job depends on the process that does it, so any number of them gives the same results.
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
from multiprocessing import get_context
from typing import TypeVar

Item = TypeVar("Item")
Job = TypeVar("Job")
Result = TypeVar("Result")

AHEAD = 3  # jobs that wait for each process, so that none is idle
MANY = 1_000  # items that are worth processes, which start for a fifth of a second
EARLY = 8  # processes that start before it is known how many jobs there are


class Workers:
    """Up to `processes` processes, which stay until this context ends.

    Workers are started afresh (no fork: libraries hold locks and threads) and die with this
    process, however it ends.
    """

    def __init__(self, processes: int) -> None:
        self.processes = processes
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)

    def start_in_time(self, items: Iterable[Item], module: str) -> Iterator[Item]:
        """The same items. Where there are many, processes start and import a module meanwhile."""
        for number, item in enumerate(items, 1):
            if number == MANY and self.processes > 1:
                with _worker_start():
                    for _ in range(min(self.processes, EARLY)):
                        self._started().submit(_import, module)
            yield item

    def run(
        self, work: Callable[[Job], Result], jobs: Iterable[Job], number: int
    ) -> Iterator[Result]:
        """`work` of each of `number` jobs, in the order in which they end; in this process when one
        is enough. Jobs are taken as they are needed, a few ahead."""
        processes = min(self.processes, number)
        if processes <= 1:
            yield from map(work, jobs)
            return
        pool, rest = self._started(), iter(jobs)

        def submit(most: int) -> set[Future[Result]]:
            with _worker_start():  # each may start a process
                return {pool.submit(work, job) for job in islice(rest, most)}

        try:
            running = submit(AHEAD * processes)
            while running:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                running |= submit(len(done))
                for future in done:
                    yield future.result()
        except BrokenProcessPool:
            raise ChildProcessError(
                "a worker process died, perhaps for lack of memory; with fewer --jobs the same "
                "command goes on from here"
            ) from None

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
    """Workers.run, with workers for these jobs alone."""
    with Workers(processes) as workers:
        yield from workers.run(work, jobs, len(jobs))


@contextmanager
def _worker_start() -> Iterator[None]:
    """Processes that are started meanwhile use one thread in numpy's BLAS and in OpenMP, and take
    no Ctrl-C until _enter_worker."""
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
    """In a worker: Ctrl-C ends it without a traceback, and the parent's death kills it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the line above
            os._exit(1)
