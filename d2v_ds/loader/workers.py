"""The loader's worker processes: lots in, batches out, in the order in which they were asked for.

    Workers --lot--> worker: make(lot) --arrays into shared memory, a short reply--> Workers

A rank has threads by the time it makes its loader (gloo, NCCL, the watchdog), and a process that is
forked beside threads can inherit a lock that nobody will ever open. So workers are forked from a
server: a fresh process, one in each rank for all its loaders, that has imported what they need and
has no threads.

The shared memory has no name (memfd), is mapped by both sides and used again for every batch. So
nothing is left of it however the processes end, and the size of /dev/shm does not matter.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import mmap
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any, Protocol

import torch

from d2v_ds.distributed.launcher import die_with_parent
from d2v_ds.distributed.stop import STOP_SIGNALS
from d2v_ds.errors import UserError

PREFETCH = 2  # lots that a worker has at a time, each with a memory of its own
ALIGNMENT = 64  # bytes, of the arrays in it
PAGE = mmap.PAGESIZE
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
NUMBER = struct.Struct("<q")


class Maker(Protocol):
    """What a worker does. It is pickled, so its class must be importable."""

    def __call__(self, lot: Any, reading: Callable[[int], None]) -> Any:
        """reading: is told the number of each sample before it is read."""


class Workers:
    """Iterates make(lot) for every lot, made ahead by worker processes, each in its turn.

    own: copies what came out, for it lies in memory that is used again. name: a sample by its
    number, for messages. Raises what a worker raised: a UserError as it is, others as RuntimeError
    with their traceback; ChildProcessError when a worker dies, and TimeoutError when one makes
    nothing for `patience` seconds.
    """

    def __init__(
        self,
        make: Maker,
        lots: Iterator[Any],
        workers: int,
        *,
        own: Callable[[Any], Any],
        name: Callable[[int], str],
        patience: float,
    ) -> None:
        self.lots, self.own, self.name, self.patience = lots, own, name, patience
        # As they are now: the server, and with it the workers, may have been started long ago.
        source = pickle.dumps((sys.path, {**os.environ, **ONE_THREAD}, pickle.dumps(make)))
        self.workers = [_Worker(source) for _ in range(workers)]
        self.asked: deque[tuple[_Worker, int]] = deque()
        for slot in range(PREFETCH):
            for worker in self.workers:
                self._ask(worker, slot)

    def _ask(self, worker: _Worker, slot: int) -> None:
        message = pickle.dumps((slot, next(self.lots)))
        with contextlib.suppress(ConnectionError):  # it died, which is told when its turn comes
            worker.connection.send_bytes(message)
        self.asked.append((worker, slot))

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        worker, slot = self.asked.popleft()
        item = self.own(self._answer(worker, slot))
        self._ask(worker, slot)
        return item

    def _answer(self, worker: _Worker, slot: int) -> Any:
        try:
            if not worker.connection.poll(self.patience):
                raise TimeoutError(
                    f"loader worker {worker.pid} has made nothing for {self.patience:g} s; it "
                    f"reads {self._read_by(worker)}"
                )
            good, item = worker.memory[slot].load(worker.connection.recv_bytes())
        except (EOFError, ConnectionError):
            raise ChildProcessError(
                f"loader worker {worker.pid} died, perhaps for lack of memory; it read "
                f"{self._read_by(worker)}"
            ) from None
        if not good:
            raise item
        return item

    def _read_by(self, worker: _Worker) -> str:
        return "nothing yet" if worker.reading < 0 else self.name(worker.reading)

    @property
    def pids(self) -> list[int]:
        return [worker.pid for worker in self.workers]

    def close(self) -> None:
        """Ends the processes; iterating is over."""
        self.asked.clear()
        while self.workers:
            self.workers.pop().close()


class _Worker:
    """One process, as the rank sees it."""

    def __init__(self, source: bytes) -> None:
        files = [_nameless_memory() for _ in range(1 + PREFETCH)]
        ours, theirs = socket.socketpair()
        _start_worker([theirs.fileno(), *files], source)
        theirs.close()
        self.connection = Connection(ours.detach())
        self.state = mmap.mmap(files[0], PAGE)  # see _State
        self.memory = [_Memory(file) for file in files[1:]]
        os.close(files[0])

    @property
    def pid(self) -> int:
        return int(NUMBER.unpack_from(self.state, 0)[0])

    @property
    def reading(self) -> int:
        return int(NUMBER.unpack_from(self.state, NUMBER.size)[0])

    def close(self) -> None:
        """It ends as its connection does, and at the latest with the server."""
        self.connection.close()
        for memory in self.memory:
            memory.close()


class _Memory:
    """Memory that two processes map, each as far as it has grown."""

    def __init__(self, file: int) -> None:
        self.file, self.size = file, 0
        self.map = mmap.mmap(-1, PAGE)

    def store(self, item: Any) -> bytes:
        """The reply: places in this memory of `item` pickled, and of the arrays in it."""
        arrays: list[pickle.PickleBuffer] = []
        text = io.BytesIO()
        _Pickler(text, protocol=5, buffer_callback=arrays.append).dump(item)
        parts = [memoryview(text.getvalue()), *(array.raw() for array in arrays)]
        places, end = [], 0
        for part in parts:
            places.append((end, part.nbytes))
            end += -(-part.nbytes // ALIGNMENT) * ALIGNMENT
        if end > self.size:
            os.ftruncate(self.file, max(end, 2 * self.size))
        self._map(end)
        for (first, size), part in zip(places, parts, strict=True):
            self.map[first : first + size] = part
        return pickle.dumps(places)

    def load(self, reply: bytes) -> Any:
        """What `store` was given on the other side; its arrays are views of this memory."""
        places = pickle.loads(reply)
        self._map(sum(places[-1]))
        view = memoryview(self.map)
        text, *arrays = [view[first : first + size] for first, size in places]
        return pickle.loads(text, buffers=arrays)

    def _map(self, size: int) -> None:
        if size > self.size:  # views of the old map keep it
            self.size = os.fstat(self.file).st_size
            self.map = mmap.mmap(self.file, self.size)

    def close(self) -> None:
        os.close(self.file)


class _Pickler(pickle.Pickler):
    """Tensors as numpy arrays, whose content pickle hands over beside its own."""

    def reducer_override(self, item: Any) -> Any:
        if isinstance(item, torch.Tensor):
            return torch.from_numpy, (item.numpy(),)
        return NotImplemented


def _nameless_memory() -> int:
    """A file of one page that no folder holds."""
    if sys.platform == "linux":
        file = os.memfd_create("d2v_ds")
    else:
        with tempfile.TemporaryFile() as temporary:
            file = os.dup(temporary.fileno())
    os.ftruncate(file, PAGE)
    return file


# -------------------------------------------------------------------------------- the server's side


class _Server:
    """The process that workers are forked from, as the rank sees it."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        self.socket, theirs = socket.socketpair()
        code = (
            f"import sys; sys.path[:] = {sys.path!r}\n"
            f"from d2v_ds.loader.workers import serve; serve({theirs.fileno()})"
        )
        # A signal to stop, which launchers send to every process, is for the trainer: it needs its
        # workers to finish the step and save. They inherit this mask and keep it.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-c", code],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env={**os.environ, **ONE_THREAD},
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        theirs.close()

    def close(self) -> None:
        """Ends it, and with it all workers."""
        if self.owner == os.getpid():
            self.process.kill()
            self.process.wait()
            self.socket.close()


_server: _Server | None = None  # of this process


def _start_worker(files: Sequence[int], source: bytes) -> None:
    """Asks the server for a worker; returns at once."""
    global _server
    if _server is None or _server.owner != os.getpid() or _server.process.poll() is not None:
        _server = _Server()
        atexit.register(_server.close)
    with contextlib.suppress(ConnectionError):  # it died: the worker's end is closed as well
        socket.send_fds(_server.socket, [NUMBER.pack(len(source))], files)
        _server.socket.sendall(source)


def serve(file: int) -> None:
    """The life of the server: forks a worker for every request, until its rank ends."""
    from d2v_ds import modalities  # noqa: F401  so that no worker spends time on importing them

    torch.set_num_threads(1)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for workers
    requests = socket.socket(fileno=file)
    server = os.getpid()
    while True:
        size, files, _, _ = socket.recv_fds(requests, NUMBER.size, 2 + PREFETCH)
        if not size:
            return
        source = _receive(requests, NUMBER.unpack(size)[0])
        if os.fork() == 0:
            try:
                requests.close()
                _work(server, source, *files)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        for each in files:
            os.close(each)


def _receive(connection: socket.socket, size: int) -> bytes:
    with connection.makefile("rb", buffering=0) as stream:
        parts = bytearray()
        while len(parts) < size and (part := stream.read(size - len(parts))):
            parts += part
        return bytes(parts)


def _work(server: int, source: bytes, connection_file: int, state_file: int, *memory: int) -> None:
    """The life of a worker: until its rank closes the connection, or ends."""
    if sys.platform == "linux":
        die_with_parent()
    if os.getppid() != server:  # it ended before the call above
        return
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    connection, memories = Connection(connection_file), [_Memory(file) for file in memory]
    state = mmap.mmap(state_file, PAGE)

    def reading(sample: int) -> None:
        NUMBER.pack_into(state, NUMBER.size, sample)

    NUMBER.pack_into(state, 0, os.getpid())
    reading(-1)
    sys.path[:], environment, made = pickle.loads(source)
    os.environ.clear()
    os.environ.update(environment)
    make = None
    while True:
        try:
            slot, lot = pickle.loads(connection.recv_bytes())
        except (EOFError, ConnectionError):
            os._exit(0)
        try:
            make = make or pickle.loads(made)
            answer = True, make(lot, reading)
        except UserError as error:
            answer = False, error
        except Exception:
            answer = False, RuntimeError(f"in a loader worker:\n{traceback.format_exc()}")
        reply = memories[slot].store(answer)
        with contextlib.suppress(ConnectionError):
            connection.send_bytes(reply)
