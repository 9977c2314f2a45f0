"""Where the log of a rank goes: its file in the run folder, and the console of rank 0.

Neither may end a run: a full disk costs lines, and a closed terminal or pipe the console. Imports
no torch.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sys
from pathlib import Path
from typing import IO, TextIO

from d2v_ds.records import append, printable
from d2v_ds.secrets import MaskingFormatter, mask

log = logging.getLogger("d2v_ds")

FORMAT = MaskingFormatter("%(asctime)s %(levelname)s %(message)s")


class LogFile(logging.Handler):
    """RUN/logs/JOB.RESTART/rankNNNNN.txt. Each record is written at once; the first one after a
    failure says how many were lost."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.setFormatter(FORMAT)
        self.path, self.lost = path, 0
        self._file: IO[bytes] | None = None

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record) + "\n"
        if self.lost:
            text = f"{self.lost} messages could not be written here\n{text}"
        try:
            if self._file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self.path.open("ab", buffering=0)
            append(self._file, printable(text).encode())
            self.lost = 0
        except OSError:
            self.lost += 1

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
        super().close()


class Console(logging.Handler):
    """Standard output, for as long as somebody reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(MaskingFormatter())

    def emit(self, record: logging.LogRecord) -> None:
        try:
            print(printable(self.format(record)), file=sys.stdout, flush=True)
        except (OSError, ValueError) as error:
            release(sys.stdout, error)


def log_to(path: Path, *, console: bool) -> None:
    """Sends the log to a file, and to the console as well."""
    for handler in log.handlers:
        if isinstance(handler, LogFile):
            handler.close()
    log.handlers = [LogFile(path)]
    if console:
        log.addHandler(Console())
    log.setLevel(logging.INFO)
    log.propagate = False


def to_file_only(level: int, text: str) -> None:
    """A line in the file of the log; the command prints it itself."""
    for handler in log.handlers:
        if isinstance(handler, LogFile):
            handler.handle(log.makeRecord(log.name, level, "", 0, text, (), None))


# ------------------------------------------------------------------------------------- the console


def release(stream: TextIO | None, error: Exception) -> None:
    """After a failed write: if nobody reads the stream any more, nothing is written to it from now
    on, not even when the process ends. On a full disk only the text is lost."""
    gone = (errno.EPIPE, errno.EIO, errno.EBADF)
    if stream is None or (isinstance(error, OSError) and error.errno not in gone):
        return
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def say(text: str) -> None:
    """A line on the standard error output, if there is one."""
    if sys.stderr is None:
        return
    line = " ".join(printable(mask(text)).splitlines())
    try:
        print(line, file=sys.stderr, flush=True)
    except (OSError, ValueError) as error:
        release(sys.stderr, error)


def open_standard_streams() -> None:
    """Opens those of stdin, stdout and stderr that the parent process has closed. Otherwise the
    next files get their numbers, and messages of libraries would be written into them."""
    for number, name in ((0, "stdin"), (1, "stdout"), (2, "stderr")):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w" if number else "r"))


def close_standard_streams() -> None:
    """Writes what is buffered; a reader that has gone does not change the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            try:
                stream.flush()
            except (OSError, ValueError) as error:
                release(stream, error)
