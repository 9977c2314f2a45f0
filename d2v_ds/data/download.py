"""Downloads: the complete content of a URL, or an error.

    URL --download--> file;  URL --fetch--> open file and its SHA-256;  URL --read_all--> bytes

Who reads a URL, in this order:

1. http(s): the standard library; `pipe:COMMAND`: a shell
2. schemes that this program registered in `webdataset.gopen.gopen_schemes`, and those of
   USE_AIS_FOR: their handler
3. schemes of fsspec whose package is installed (s3, gs, hf, file ...): fsspec
4. the other schemes of webdataset (ais, scp, sftp, htgs ...): its handlers, by command-line tools

Temporary errors are retried for TRY_FOR. Whoever sends nothing for SILENCE is given up, and a
command is then killed with its children. answer.py has the open streams. Passwords and tokens in
URLs and commands are masked in messages.
"""

from __future__ import annotations

import contextlib
import errno
import http.client
import logging
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, TypeVar
from urllib.parse import quote

from d2v_ds.data.answer import SILENCE, Answer
from d2v_ds.data.set_file import plain_name
from d2v_ds.errors import UserError
from d2v_ds.files import CHUNK, copy
from d2v_ds.secrets import mask

Result = TypeVar("Result")

log = logging.getLogger("d2v_ds")

TRY_FOR = 240.0  # seconds of retries before a download fails
PAUSE, LONGEST_PAUSE = 0.5, 15.0  # seconds between retries; the pause doubles
LONG = 2 * SILENCE  # seconds after which a failure begins a new outage
OUTAGES = 5  # after so many, a download has failed: it would break off each time
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
HTTP = ("http://", "https://")
IN_PATHS = "!$&'()*+,;=:@~"  # characters of a name that a URL's path may have as they are
# Names that neither a shell nor fsspec reads as anything but a name, also between quotes.
SAFE_NAME = re.compile(r"(?!.*::)[\w@%+=:,.-]+")


def is_remote(where: str) -> bool:
    return where.startswith("pipe:") or "://" in where


def url_of(where: str, name: str) -> str:
    """The URL or command for one file of the set at `where`.

    name: may come from an index.json that somebody else wrote. Raises UserError for one that is not
    the plain name of a file or, in a command or a scheme that may call one, could be more than a
    name to a shell.
    """
    try:
        plain_name(name)
    except ValueError as error:
        raise UserError(f"{mask(where)}: {error}") from None
    if where.startswith(HTTP):
        return f"{where.rstrip('/')}/{quote(name, safe=IN_PATHS)}"
    if not SAFE_NAME.fullmatch(name):
        raise UserError(
            f"{mask(where)}: the name {name!r} cannot be part of a command; rename the file, so "
            "that its name has only letters, digits and _ - . , = + % @ :"
        )
    if where.startswith("pipe:"):
        if "{}" not in where:
            raise UserError(f"data.shards: {mask(where)!r} needs {{}} where the file name belongs")
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
    until, pause, outages = 0.0, PAUSE, 0
    while True:
        began = time.monotonic()
        try:
            return work()
        except (EOFError, OSError, http.client.HTTPException) as error:
            if isinstance(error, OSError) and (error.filename or error.errno in DISK_FULL):
                raise  # an error of the local disk
            failed = time.monotonic()
            if not until or failed - began > LONG:  # a new outage
                until, pause, outages = failed + TRY_FOR, PAUSE, outages + 1
            reason = mask(str(error))
            if failed + pause > until or outages > OUTAGES:
                raise UserError(f"{mask(url)}: the download failed ({reason})") from None
            log.warning("%s: %s; retrying in %g s", mask(url), reason, pause)
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)


def fetch(url: str, file: BinaryIO, size: int | None = None, most: int | None = None) -> str:
    """Appends the content of a URL to `file` and returns its SHA-256.

    Raises EOFError if the size is not `size` or, without `size`, not the one that the server sent,
    and UserError if it is more than `most` bytes.
    """

    def check_size(found: int) -> None:
        if size is not None and found > size:
            raise EOFError(f"has more than {size} bytes")
        if most is not None and found > most:
            raise _too_large(url, most)

    with contextlib.closing(Answer(url)) as answer:
        start = file.tell()
        digest = copy(answer, file, check_size)
        answer.check(file.tell() - start, answer.size if size is None else size)
    file.flush()
    return digest


def read_all(url: str, most: int) -> bytes:
    """The content of a URL. Raises UserError if it is more than `most` bytes."""
    chunks, found = [], 0
    with contextlib.closing(Answer(url)) as answer:
        while chunk := answer.read(CHUNK):
            chunks.append(chunk)
            found += len(chunk)
            if found > most:
                raise _too_large(url, most)
        answer.check(found, answer.size)
    return b"".join(chunks)


def _too_large(url: str, most: int) -> UserError:
    return UserError(f"{mask(url)}: has more than {most} bytes, so it cannot be part of a set")
