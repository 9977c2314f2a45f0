"""The loader's worker processes: lots in, batches out, in the order of the lots.

    LoaderWorkers --lot--> worker: make(lot) --pickle--> LoaderWorkers

A rank has threads by the time it creates its loader (gloo, NCCL, the watchdog), and a process
forked beside threads can inherit a lock that is never released. Workers are therefore forked from
multiprocessing's fork server: one process per rank, which has imported what they need and has no
threads. Batches travel through a socket, so the size of /dev/shm does not matter.

torch's DataLoader was measured against this (benchmarks/loader.py workers). It takes 10 to 115 %
more CPU time per batch, detects a dead worker only after its timeout, or hangs, and does not
know which sample a worker was reading.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import multiprocessing
import os
import pickle
import queue
import signal
import socket
import sys
import threading
import traceback
import types
from collections import deque
from collections.abc import Callable, Iterator
from multiprocessing import connection as connections
from multiprocessing import forkserver, resource_tracker
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from d2v_ds.distributed.launcher import die_with_parent
from d2v_ds.distributed.signals import STOP_SIGNALS
from d2v_ds.errors import UserError

PREFETCH = 2  # lots that each worker has at a time
PRELOADED = [__name__, "d2v_ds.loader.reading"]  # modules that the fork server imports
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
CLOSING = 5.0  # seconds that a killed worker may take to end
NOTHING = -1  # sample_id of a worker that has not read yet
CONTEXT = multiprocessing.get_context("forkserver")


class Maker(Protocol):
    """What a worker does. It is pickled, so its class must be importable from a module."""

    def __call__(self, lot: Any, reading: Callable[[int], None]) -> Any:
        """reading: called with the sample_id of each sample before it is read."""


class LoaderWorkers:
    """Iterates make(lot) for every lot. Worker processes make the items in advance, in turn.

    name: returns the name of a sample_id, for messages. Raises what a worker raised: a UserError
    unchanged, any other exception as RuntimeError with its traceback; ChildProcessError if a worker
    died; TimeoutError if a worker produced no batch for `patience` seconds.
    """

    def __init__(
        self,
        make: Maker,
        lots: Iterator[Any],
        workers: int,
        *,
        name: Callable[[int], str],
        patience: float,
    ) -> None:
        self.lots, self.name, self.patience = lots, name, patience
        # Workers get the current environment, because that of the server may be outdated.
        source = pickle.dumps((sys.path, {**os.environ, **ONE_THREAD}, pickle.dumps(make)))
        start_server()
        self.workers = [_Worker(source) for _ in range(workers)]
        atexit.register(self.close)  # otherwise multiprocessing would wait for the workers to end
        self.asked: deque[_Worker] = deque()
        for _ in range(PREFETCH):
            for worker in self.workers:
                self._ask(worker)

    def _ask(self, worker: _Worker) -> None:
        parts = parts_of(next(self.lots))
        with contextlib.suppress(ConnectionError):  # it died; _answer raises when its turn comes
            send(worker.socket, parts)
        self.asked.append(worker)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        worker = self.asked.popleft()
        item = self._answer(worker)
        self._ask(worker)
        return item

    def _answer(self, worker: _Worker) -> Any:
        try:
            worker.socket.settimeout(self.patience)
            good, item = receive(worker.socket)
        except TimeoutError:
            raise TimeoutError(
                f"loader worker {worker.pid} has produced no batch for {self.patience:g} s; "
                f"it is reading {self._read_by(worker)}"
            ) from None
        except (EOFError, ConnectionError):
            raise ChildProcessError(
                f"loader worker {worker.pid} died, possibly out of memory; it was reading "
                f"{self._read_by(worker)}"
            ) from None
        if not good:
            raise item
        return item

    def _read_by(self, worker: _Worker) -> str:
        sample_id = worker.reading.value
        return "nothing yet" if sample_id == NOTHING else self.name(sample_id)

    @property
    def pids(self) -> list[int]:
        return [worker.pid for worker in self.workers]

    def close(self) -> None:
        """Ends the processes. Afterwards the iterator is exhausted."""
        atexit.unregister(self.close)
        self.asked.clear()
        while self.workers:
            self.workers.pop().close()


class _Worker:
    """One process, as the rank sees it."""

    def __init__(self, source: bytes) -> None:
        self.socket, theirs = socket.socketpair()
        self.reading = CONTEXT.RawValue("q", NOTHING)  # sample_id, in shared memory
        arguments = (source, theirs, self.reading)
        self.process = CONTEXT.Process(target=_work, args=arguments, daemon=True)
        with _without_main():
            self.process.start()
        theirs.close()
        self.pid = self.process.pid or 0

    def close(self) -> None:
        self.socket.close()
        self.process.kill()  # it blocks SIGTERM
        self.process.join(CLOSING)
        if self.process.exitcode is not None:
            self.process.close()
        else:  # it hangs in the kernel: multiprocessing would wait for it when the rank exits
            multiprocessing.process._children.discard(self.process)  # type: ignore[attr-defined]


def start_server() -> None:
    """Starts the fork server of this process unless it is running; returns at once.

    Launchers send stop signals to every process, but only the trainer must handle them: it needs
    its workers to finish the step and save. Workers inherit the server's signal mask.
    """
    CONTEXT.set_forkserver_preload(PRELOADED)
    resource_tracker.ensure_running()  # resets the signal mask, so it must come first
    environment = dict(os.environ)
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    os.environ.update(ONE_THREAD)
    try:
        forkserver.ensure_running()
    finally:
        for name in ONE_THREAD.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


@contextlib.contextmanager
def _without_main() -> Iterator[None]:
    """multiprocessing imports the main script in every process that it starts. That would run a
    training script without `if __name__ == "__main__"`, and import all that it imports."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


# ---------------------------------------------------------------------------------- in the worker


def _work(source: bytes, rank: socket.socket, state: Any) -> None:
    """Serves lots until the rank closes the socket or ends."""
    if sys.platform == "linux":
        die_with_parent()  # the server
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    threading.Thread(target=_end_with_rank, daemon=True).start()
    torch.set_num_threads(1)
    sys.path[:], environment, made = pickle.loads(source)
    os.environ.clear()
    os.environ.update(environment)
    finished: queue.SimpleQueue[list[Any]] = queue.SimpleQueue()
    threading.Thread(target=_send, args=(rank, finished), daemon=True).start()

    def reading(sample_id: int) -> None:
        state.value = sample_id

    make = None
    while True:
        try:
            lot = receive(rank)
        except (EOFError, ConnectionError):
            os._exit(0)
        try:
            make = make or pickle.loads(made)
            answer = parts_of((True, make(lot, reading)))
        except UserError as error:
            answer = parts_of((False, error))
        except Exception:
            message = f"in a loader worker:\n{traceback.format_exc()}"
            answer = parts_of((False, RuntimeError(message)))
        finished.put(answer)


def _end_with_rank() -> None:
    """Ends this process with its rank, even while a read hangs."""
    rank = multiprocessing.parent_process()
    assert rank is not None
    connections.wait([rank.sentinel])
    os._exit(1)


def _send(rank: socket.socket, finished: queue.SimpleQueue[list[Any]]) -> None:
    """Sends items while the next lot is being made: the socket holds less than an item."""
    while True:
        with contextlib.suppress(ConnectionError):
            send(rank, finished.get())


# ------------------------------------------------------------------------------------- transport


class _Pickler(pickle.Pickler):
    """Pickles tensors as numpy arrays, whose content can be sent without a copy."""

    def reducer_override(self, item: Any) -> Any:
        if isinstance(item, torch.Tensor):
            return torch.from_numpy, (item.numpy(),)
        return NotImplemented


def parts_of(item: Any) -> list[Any]:
    """What is sent of an item: the number and sizes of its parts, its pickle, its arrays."""
    arrays: list[pickle.PickleBuffer] = []
    content = io.BytesIO()
    _Pickler(content, protocol=5, buffer_callback=arrays.append).dump(item)
    parts = [content.getbuffer(), *(array.raw() for array in arrays)]
    return [np.array([len(parts), *(part.nbytes for part in parts)], np.int64), *parts]


def send(to: socket.socket, parts: list[Any]) -> None:
    for part in parts:
        to.sendall(part)


def receive(source: socket.socket) -> Any:
    """The item that was sent. Raises EOFError or ConnectionError if the other side has ended,
    TimeoutError if it sends nothing for the socket's timeout."""
    [count] = _read(source, 8).view(np.int64)
    content, *arrays = [_read(source, size) for size in _read(source, 8 * count).view(np.int64)]
    return pickle.loads(content.tobytes(), buffers=arrays)


def _read(source: socket.socket, size: int) -> npt.NDArray[np.uint8]:
    data = np.empty(size, np.uint8)
    left = data.data
    while left:
        received = source.recv_into(left)
        if not received:
            raise EOFError
        left = left[received:]
    return data
