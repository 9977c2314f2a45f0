"""Stop signals from the beginning of a command to its end, so that none of them ends it half-way.

    hold, first thing in a command --> received --> StopFlag, which stops the run after a step
    ignore, once the run is saved

Imports no torch: that takes seconds in which signals arrive.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)
AGAIN = b"d2v-ds: the run stops before its first step; press Ctrl-C again to end it at once\n"

received: list[signal.Signals] = []  # before a StopFlag took over
_holds = False


def hold() -> None:
    """From now on, a stop signal is only remembered. A second Ctrl-C ends the process as usual."""
    global _holds
    if _holds:
        return
    _holds = True
    for number in STOP_SIGNALS:
        signal.signal(number, _remember)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # blocked by `blocked`
    atexit.register(ignore)


def _remember(number: int, frame: FrameType | None) -> None:
    if number == signal.SIGINT:
        if signal.SIGINT in received:
            raise KeyboardInterrupt
        if os.environ.get("RANK", "0") == "0":
            with contextlib.suppress(OSError):
                os.write(2, AGAIN)  # print may not be called in a handler of signals
    received.append(signal.Signals(number))


def ignore() -> None:
    """The result is in the run folder: from now on a signal changes nothing. Only after `hold`."""
    if _holds:
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def blocked() -> Iterator[None]:
    """A process that is started here gets its signals only when it calls `hold`."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
