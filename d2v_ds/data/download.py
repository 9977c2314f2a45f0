"""Downloads: the complete content of a URL, or an error.

    URL --download--> file;  URL --fetch--> open file and its SHA-256;  URL --read_all--> bytes

The standard library reads http(s), and a shell reads `pipe:COMMAND`. fsspec reads other schemes
(s3, gs, hf ...) for which its package is installed; webdataset's `gopen` reads the rest of those
that it knows, by command-line tools (gs, hf, ais, scp, sftp ...). Temporary errors are retried for
TRY_FOR.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import hashlib
import http.client
import logging
import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from d2v_ds.errors import UserError

Result = TypeVar("Result")

log = logging.getLogger("d2v_ds")

TRY_FOR = 240.0  # seconds of retries before a download fails
PAUSE, LONGEST_PAUSE = 0.5, 15.0  # seconds between retries; the pause doubles
SILENCE = 60.0  # seconds without a byte after which a connection has failed
CHUNK = 1 << 20  # bytes
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
    with path.open("wb") as file:

        def whole() -> None:
            file.seek(0)
            file.truncate()
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
    digest, found = hashlib.sha256(), 0
    with contextlib.closing(_Answer(url)) as answer:
        while chunk := answer.stream.read(CHUNK):
            found += len(chunk)
            if size is not None and found > size:
                break
            digest.update(chunk)
            file.write(chunk)
        expected = answer.size if size is None else size
        answer.check(found, expected)
    file.flush()
    return digest.hexdigest()


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
        os.killpg(process.pid, signal.SIGKILL)


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
        try:
            import fsspec

            self.stream = fsspec.open(self.url, "rb").open()
        except FileNotFoundError:
            raise UserError(f"{self.url}: not found") from None
        except (ImportError, ValueError) as error:
            from webdataset.gopen import gopen, gopen_schemes

            if scheme not in gopen_schemes:
                raise UserError(
                    f"{self.url}: {scheme}:// requires fsspec and its package for this scheme "
                    f"({error}); install them, or use `pipe:COMMAND {{}}`"
                ) from None
            self.stream = gopen(self.url, "rb")

    def check(self, found: int, expected: int | None) -> None:
        """Raises EOFError if the command failed or the content has an unexpected size."""
        code = self._exit_code()
        if code == COMMAND_NOT_FOUND:
            raise UserError(f"{self.url}: the command was not found on this machine")
        if code:
            raise EOFError(f"the command ended with exit code {code}")
        if expected is not None and found != expected:
            raise EOFError(f"ended after {found} of {expected} bytes")

    def _exit_code(self) -> int:
        process = self.process or getattr(self.stream, "proc", None)  # proc: of webdataset's Pipe
        return process.wait() if process else 0

    def close(self) -> None:
        with contextlib.suppress(OSError):  # webdataset's Pipe: its command was interrupted
            self.stream.close()
        if self.process:
            _kill(self.process)
            self.process.wait()
            _running.discard(self.process)
