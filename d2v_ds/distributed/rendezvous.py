"""How the ranks of a Slurm step find rank 0: no two steps ever share a store.

rank 0: opens a store on a free port, and answers on the first free one of PORTS known ports
others: ask these ports until one answers with this step's key --> the store
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Sequence
from datetime import timedelta

from torch._C._distributed_c10d import Store, TCPStore

from d2v_ds.distributed.world import World, port_of
from d2v_ds.errors import UserError

MEETING = timedelta(seconds=300)  # within which all ranks must start
PORTS = 8  # tried in turn, since another program may use the first


def meet(world: World) -> Store:
    """The store of this step's ranks; no two steps ever share one.

    Rank 0 opens it on a port that the system chooses, and sends the port and the step's key to
    every client of the first free one of PORTS ports that all ranks know. Raises UserError if
    none of these is free, RuntimeError if rank 0 is not found.
    """
    ports = [world.port, *(port_of(world.key, attempt) for attempt in range(1, PORTS))]
    if world.rank == 0:
        listener = _first_free(world, ports)
        store = TCPStore(world.address, 0, None, True, MEETING, wait_for_workers=False)
        greeting = f"d2v_ds {world.key} {store.port}\n".encode()
        threading.Thread(target=_answer, args=(listener, greeting), daemon=True).start()
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


def _answer(listener: socket.socket, greeting: bytes) -> None:
    """Sends the greeting to every client; ranks of other jobs try the next port."""
    while True:
        with contextlib.suppress(OSError), listener.accept()[0] as asker:
            asker.sendall(greeting)


def _ask(world: World, port: int) -> int | None:
    """The port of the store, if this step's rank 0 answers on `port`."""
    try:
        with socket.create_connection((world.address, port), timeout=5) as asked:
            name, key, store_port = asked.makefile("rb").readline(200).decode().split()
    except (OSError, ValueError):  # no answer, or another program
        return None
    return int(store_port) if (name, key) == ("d2v_ds", world.key) else None
