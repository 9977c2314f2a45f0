"""Files from elsewhere: whole, or an error.

    URL --download--> a file;  URL --fetch--> an open one, and its SHA-256;  URL --read_all--> bytes

http(s) is read by the standard library, `pipe:COMMAND` is what a command writes, all else (s3, gs,
hf ...) is read by fsspec. What may change by waiting is tried again, as long as TRY_FOR.
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

TRY_FOR = 240.0  # seconds, before a download is given up
PAUSE, LONGEST_PAUSE = 0.5, 15.0  # seconds between tries: doubles
SILENCE = 60.0  # seconds without a byte
CHUNK = 1 << 20  # bytes
FULL = (errno.ENOSPC, errno.EDQUOT)


def is_remote(where: str) -> bool:
    return where.startswith("pipe:") or "://" in where


def url_of(where: str, name: str) -> str:
    if where.startswith("pipe:"):
        if "{}" not in where:
            raise UserError(f"data.shards: {where!r} has no {{}} in place of a file's name")
        return where.replace("{}", name)
    return f"{where.rstrip('/')}/{name}"


def download(url: str, path: Path) -> None:
    """A whole file of unknown size. Raises UserError; OSError of this machine's disk."""
    with path.open("wb") as file:

        def whole() -> None:
            file.seek(0)
            file.truncate()
            fetch(url, file)

        try_again(whole, url)


def try_again(work: Callable[[], Result], url: str) -> Result:
    """Until it succeeds, or has failed for TRY_FOR. What does not change by waiting is raised at
    once."""
    until, pause = 0.0, PAUSE
    while True:
        began = time.monotonic()
        try:
            return work()
        except (EOFError, OSError, http.client.HTTPException) as error:
            if isinstance(error, OSError) and (error.filename or error.errno in FULL):
                raise  # of this machine's disk
            failed = time.monotonic()
            if not until or failed - began > 2 * SILENCE:  # it went well for a while
                until, pause = failed + TRY_FOR, PAUSE
            if failed + pause > until:
                raise UserError(f"{url}: cannot be downloaded ({error})") from None
            log.warning("%s: %s; trying again in %g s", url, error, pause)
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)


def fetch(url: str, file: BinaryIO, size: int | None = None) -> str:
    """Appends what is at a URL; its SHA-256. Raises EOFError when it is not of the given size, or
    not of the one that the other side said."""
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


_running: set[subprocess.Popen[bytes]] = set()  # commands that background threads wait for


@atexit.register
def _kill_running() -> None:
    for process in list(_running):
        _kill(process)


def _kill(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:  # else its number may be another's by now
        os.killpg(process.pid, signal.SIGKILL)


class _Answer:
    """What another machine sends. Raises UserError where nothing is to be had at that URL, and what
    `try_again` knows where that may change."""

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
                start_new_session=True,  # to be killed with all that it starts
            )
            _running.add(self.process)
            self.stream = self.process.stdout
        elif url.startswith(("http://", "https://")):
            self._ask_http()
        else:
            self._ask_fsspec()

    def _ask_http(self) -> None:
        try:
            self.stream = urllib.request.urlopen(self.url, timeout=SILENCE)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code < 500 and error.code not in (408, 429):
                raise UserError(f"{self.url}: {error.code} {error.reason}") from None
            raise ConnectionError(f"{error.code} {error.reason}") from None
        length = self.stream.headers.get("Content-Length")
        self.size = int(length) if length else None

    def _ask_fsspec(self) -> None:
        scheme = self.url.partition("://")[0]
        try:
            import fsspec

            self.stream = fsspec.open(self.url, "rb").open()
        except FileNotFoundError:
            raise UserError(f"{self.url}: not found") from None
        except (ImportError, ValueError) as error:
            raise UserError(
                f"{self.url}: {scheme}:// needs fsspec and its package for it ({error}); install "
                "them, or give `pipe:COMMAND {}`"
            ) from None

    def check(self, found: int, expected: int | None) -> None:
        if self.process and (code := self.process.wait()):
            raise EOFError(f"the command ended with exit code {code}")
        if expected is not None and found != expected:
            raise EOFError(f"ended after {found} of {expected} bytes")

    def close(self) -> None:
        self.stream.close()
        if self.process:
            _kill(self.process)
            self.process.wait()
            _running.discard(self.process)
