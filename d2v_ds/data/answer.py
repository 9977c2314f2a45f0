"""The open content of a URL, read with a limit on silence.

    Answer(url).read(size) -> bytes; TimeoutError after SILENCE without any

A connection or a command may stay open and send nothing for ever. Sockets have a timeout for that.
Of a command, the pipe is polled. Libraries and handlers of other schemes have no limit that all of
them share, so a thread opens and reads their streams, and the reader waits for the thread.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import http.client
import os
import queue
import select
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any

from d2v_ds.errors import UserError
from d2v_ds.secrets import mask

SILENCE = 60.0  # seconds without a byte after which a connection or a command has failed
COMMAND_NOT_FOUND = 127  # exit code of a shell
PIPE = 1 << 20  # bytes that a pipe is asked to hold; a user without privileges may get 64 KiB
BLOCK = 1 << 18  # bytes that a thread reads at a time; SILENCE is for each of them
AHEAD = 8  # blocks that a thread reads in advance

_running: set[subprocess.Popen[bytes]] = set()  # commands that background threads read from


@atexit.register
def _kill_running() -> None:
    for process in list(_running):
        _kill(process)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kills a command and its children. A PID is not given to another process
    before `wait` has returned."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            if os.getpgid(process.pid) == process.pid:
                os.killpg(process.pid, signal.SIGKILL)
            else:
                process.kill()


class Answer:
    """The open content of a URL.

    Raises UserError for permanent errors and, for temporary ones, errors that `try_again` retries
    (OSError, EOFError, HTTPException).
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.size: int | None = None
        self.process: subprocess.Popen[bytes] | None = None
        self.stream: Any
        if url.startswith("pipe:"):
            self.process = subprocess.Popen(
                url.removeprefix("pipe:"),
                shell=True,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                bufsize=0,
                start_new_session=True,  # so that its children are killed with it
            )
            _running.add(self.process)
            self.stream = _Pipe(self.process.stdout)
        elif url.startswith(("http://", "https://")):
            self._open_http()
        else:
            self.stream = _Thread(self._open_other)

    def read(self, size: int) -> bytes:
        """Some of the next bytes; none at the end."""
        data: bytes = self.stream.read(size)
        return data

    def check(self, found: int, expected: int | None) -> None:
        """Raises EOFError if the command failed or the content has an unexpected size."""
        try:
            code = self.process.wait(SILENCE) if self.process else 0
        except subprocess.TimeoutExpired:
            raise EOFError(f"the command sent all, but did not end in {SILENCE:g} s") from None
        if code == COMMAND_NOT_FOUND:
            raise UserError(f"{mask(self.url)}: the command was not found on this machine")
        if code:
            raise EOFError(f"the command ended with exit code {code}")
        if expected is not None and found != expected:
            raise EOFError(f"ended after {found} of {expected} bytes")

    def close(self) -> None:
        if self.process:
            _kill(self.process)
            self.process.wait()
            _running.discard(self.process)
        with contextlib.suppress(OSError):  # webdataset's Pipe raises it for a killed command
            self.stream.close()

    # --------------------------------------------------------------------------------- schemes

    def _open_http(self) -> None:
        try:
            self.stream = urllib.request.urlopen(self.url, timeout=SILENCE)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code < 500 and error.code not in (408, 429):
                raise UserError(f"{mask(self.url)}: {error.code} {error.reason}") from None
            raise ConnectionError(f"{error.code} {error.reason}") from None
        except (ValueError, http.client.InvalidURL):  # its message may have a password
            raise UserError(
                f"{mask(self.url)}: is not a URL that can be opened; for one with a login, use "
                "`pipe:curl ...`"
            ) from None
        length = self.stream.headers.get("Content-Length") or ""
        self.size = int(length) if length.isdecimal() and len(length) < 20 else None

    def _open_other(self) -> Any:
        scheme = self.url.partition("://")[0]
        of_ais = os.environ.get("USE_AIS_FOR", "").split(":")
        if scheme in of_ais or scheme in registered_schemes():
            return self._open_gopen()
        try:
            import fsspec

            return fsspec.open(self.url, "rb").open()
        except FileNotFoundError:
            raise UserError(f"{mask(self.url)}: not found") from None
        except (ImportError, ValueError) as error:
            from webdataset.gopen import gopen_schemes

            if scheme in gopen_schemes:
                return self._open_gopen()
            raise UserError(
                f"{mask(self.url)}: {scheme}:// requires fsspec and its package for this scheme "
                f"({mask(str(error))}); install them, or use `pipe:COMMAND {{}}`"
            ) from None
        except OSError:
            raise
        except Exception as error:  # each package has its own kinds
            raise ConnectionError(f"{type(error).__name__}: {error}") from None

    def _open_gopen(self) -> Any:
        from webdataset.gopen import gopen

        try:
            stream = gopen(self.url, "rb")
        except (ImportError, FileNotFoundError) as error:  # of the command-line tool
            raise UserError(
                f"{mask(self.url)}: webdataset cannot read it ({error}); install what is missing, "
                "or use `pipe:COMMAND {}`"
            ) from None
        process = getattr(stream, "proc", None)
        if process:
            self.process = process
            _running.add(process)
        return stream


class _Pipe:
    """The output of a command."""

    def __init__(self, pipe: Any) -> None:
        self.pipe, self.poll = pipe, select.poll()
        self.poll.register(pipe, select.POLLIN)
        with contextlib.suppress(OSError):
            fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, PIPE)

    def read(self, size: int) -> bytes:
        if not self.poll.poll(1000 * SILENCE):
            raise _silent()
        return os.read(self.pipe.fileno(), min(size, PIPE))

    def close(self) -> None:
        self.pipe.close()


class _Thread:
    """A stream that a thread opens and reads."""

    def __init__(self, opened: Callable[[], Any]) -> None:
        self.opened = opened
        self.blocks: queue.Queue[bytes | BaseException] = queue.Queue(AHEAD)
        self.closed = threading.Event()
        threading.Thread(target=self._run, daemon=True).start()

    def read(self, size: int) -> bytes:
        try:
            block = self.blocks.get(timeout=SILENCE)
        except queue.Empty:
            raise _silent() from None
        if isinstance(block, BaseException):
            raise block
        return block

    def _run(self) -> None:
        try:
            stream = self.opened()
            with contextlib.closing(stream):
                while not self.closed.is_set():
                    block = stream.read(BLOCK)
                    self._put(block)
                    if not block:
                        return
        except BaseException as error:  # raised by `read`
            self._put(error)

    def _put(self, block: bytes | BaseException) -> None:
        while not self.closed.is_set():
            with contextlib.suppress(queue.Full):
                self.blocks.put(block, timeout=1.0)
                return

    def close(self) -> None:
        """The thread ends as soon as it has read its block."""
        self.closed.set()


def _silent() -> TimeoutError:
    return TimeoutError(f"it sent nothing for {SILENCE:g} s")


# ------------------------------------------------------------------------- handlers of webdataset

Schemes = Mapping[str, Callable[..., Any]]


def registered_schemes() -> Schemes:
    """The handlers that this program registered in webdataset.gopen."""
    gopen = sys.modules.get("webdataset.gopen")
    schemes: Schemes = gopen.gopen_schemes if gopen else {}
    return {
        name: call
        for name, call in schemes.items()
        if getattr(call, "__module__", "") != "webdataset.gopen"
    }


def register_schemes(schemes: Schemes) -> None:
    """Registers handlers of another process in this one."""
    if schemes:
        from webdataset.gopen import gopen_schemes

        gopen_schemes.update(schemes)
