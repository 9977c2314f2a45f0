"""Downloads: the complete content of a URL, or an error.

    URL --download--> file;  URL --fetch--> open file and its SHA-256;  URL --read_all--> bytes

Who reads a URL, in this order:

1. http(s): the standard library; `pipe:COMMAND`: a shell
2. schemes that this program registered in `webdataset.gopen.gopen_schemes`, and those of
   USE_AIS_FOR: their handler
3. schemes of fsspec whose package is installed (s3, gs, hf, file ...): fsspec
4. the other schemes of webdataset (ais, scp, sftp, htgs ...): its handlers, by command-line tools

Temporary errors are retried for TRY_FOR.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import http.client
import logging
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from d2v_ds.errors import UserError
from d2v_ds.files import copy

Result = TypeVar("Result")

log = logging.getLogger("d2v_ds")

TRY_FOR = 240.0  # seconds of retries before a download fails
PAUSE, LONGEST_PAUSE = 0.5, 15.0  # seconds between retries; the pause doubles
SILENCE = 60.0  # seconds without a byte after which a connection has failed
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
COMMAND_NOT_FOUND = 127  # exit code of a shell


def is_remote(where: str) -> bool:
    return where.startswith("pipe:") or "://" in where


def url_of(where: str, name: str) -> str:
    if where.startswith("pipe:"):
        if "{}" not in where:
            raise UserError(f"data.shards: {where!r} needs {{}} where the file name belongs")
        return where.replace("{}", name)
    return f"{where.rstrip('/')}/{name}"


def download(url: str, path: Path) -> None:
    """Downloads a file of unknown size to `path`.

    Raises UserError if that fails, and OSError for errors of the local disk.
    """

    def whole() -> None:
        with path.open("wb") as file:  # fails, and ends the retries, if the folder was removed
            fetch(url, file)

    try_again(whole, url)


def try_again(work: Callable[[], Result], url: str) -> Result:
    """Returns `work()`, which is retried for TRY_FOR if it fails with a temporary error.

    Raises UserError when the time is up. Permanent errors are raised immediately.
    """
    until, pause = 0.0, PAUSE
    while True:
        began = time.monotonic()
        try:
            return work()
        except (EOFError, OSError, http.client.HTTPException) as error:
            if isinstance(error, OSError) and (error.filename or error.errno in DISK_FULL):
                raise  # an error of the local disk
            failed = time.monotonic()
            if not until or failed - began > 2 * SILENCE:  # a new outage
                until, pause = failed + TRY_FOR, PAUSE
            if failed + pause > until:
                raise UserError(f"{url}: the download failed ({error})") from None
            log.warning("%s: %s; retrying in %g s", url, error, pause)
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)


def fetch(url: str, file: BinaryIO, size: int | None = None) -> str:
    """Appends the content of a URL to `file` and returns its SHA-256.

    Raises EOFError if the size is not `size` or, without `size`, not the one that the server sent.
    """

    def check_size(found: int) -> None:
        if size is not None and found > size:
            raise EOFError(f"has more than {size} bytes")

    with contextlib.closing(_Answer(url)) as answer:
        start = file.tell()
        digest = copy(answer.stream, file, check_size)
        answer.check(file.tell() - start, answer.size if size is None else size)
    file.flush()
    return digest


def read_all(url: str) -> bytes:
    with contextlib.closing(_Answer(url)) as answer:
        content: bytes = answer.stream.read()
        answer.check(len(content), answer.size)
    return content


_running: set[subprocess.Popen[bytes]] = set()  # commands that background threads read from


@atexit.register
def _kill_running() -> None:
    for process in list(_running):
        _kill(process)


def _kill(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:  # otherwise its PID may belong to another process
        if os.getpgid(process.pid) == process.pid:
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()


# ------------------------------------------------------------------------------------- schemes

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


class _Answer:
    """The open content of a URL.

    Raises UserError for permanent errors and, for temporary ones, errors that `try_again` retries.
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
                start_new_session=True,  # so that its children are killed with it
            )
            _running.add(self.process)
            self.stream = self.process.stdout
        elif url.startswith(("http://", "https://")):
            self._open_http()
        else:
            self._open_other()

    def _open_http(self) -> None:
        try:
            self.stream = urllib.request.urlopen(self.url, timeout=SILENCE)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code < 500 and error.code not in (408, 429):
                raise UserError(f"{self.url}: {error.code} {error.reason}") from None
            raise ConnectionError(f"{error.code} {error.reason}") from None
        length = self.stream.headers.get("Content-Length")
        self.size = int(length) if length else None

    def _open_other(self) -> None:
        scheme = self.url.partition("://")[0]
        of_ais = os.environ.get("USE_AIS_FOR", "").split(":")
        if scheme in of_ais or scheme in registered_schemes():
            return self._open_gopen()
        try:
            import fsspec

            self.stream = fsspec.open(self.url, "rb").open()
        except FileNotFoundError:
            raise UserError(f"{self.url}: not found") from None
        except (ImportError, ValueError) as error:
            from webdataset.gopen import gopen_schemes

            if scheme in gopen_schemes:
                return self._open_gopen()
            raise UserError(
                f"{self.url}: {scheme}:// requires fsspec and its package for this scheme "
                f"({error}); install them, or use `pipe:COMMAND {{}}`"
            ) from None
        except OSError:
            raise
        except Exception as error:  # each package has its own kinds
            raise ConnectionError(f"{type(error).__name__}: {error}") from None

    def _open_gopen(self) -> None:
        from webdataset.gopen import gopen

        try:
            self.stream = gopen(self.url, "rb")
        except (ImportError, FileNotFoundError) as error:  # of the command-line tool
            raise UserError(
                f"{self.url}: webdataset cannot read it ({error}); install what is missing, or use "
                "`pipe:COMMAND {}`"
            ) from None
        process = getattr(self.stream, "proc", None)
        if process:
            self.process = process
            _running.add(process)

    def check(self, found: int, expected: int | None) -> None:
        """Raises EOFError if the command failed or the content has an unexpected size."""
        code = self.process.wait() if self.process else 0
        if code == COMMAND_NOT_FOUND:
            raise UserError(f"{self.url}: the command was not found on this machine")
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
