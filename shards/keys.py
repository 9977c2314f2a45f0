"""Keys of samples: paths and names in a form that every WebDataset reader accepts."""

from __future__ import annotations

import hashlib
import os
import re

MAX_KEY = 88  # bytes; a tar header holds 100, including `@0000` and the extension
KEY_HASH = 12  # hex digits
PLAIN = re.compile(r"(?!__)[A-Za-z0-9_-]+(?:/[A-Za-z0-9_-]+)*")  # most paths; they stay unchanged


def make_key(text: str, apart: str = "") -> str:
    """A WebDataset key from a path without its extension: letters, digits, `_`, `-` and `/`.

    webdataset cuts a name at the first dot and skips names that begin with two underscores. A key
    that is too long for a tar header ends in a hash. apart: is added to the hash of a key that
    would not be unique otherwise.
    """
    if not apart and len(text) <= MAX_KEY and PLAIN.fullmatch(text):
        return text
    key = re.sub(r"[^\w/-]", "_", os.path.normpath(text).lstrip("/"))
    key = re.sub(r"^__+", "_", key)
    if apart or len(key.encode()) > MAX_KEY:
        whole = f"{text}\0{apart}".encode("utf-8", "surrogateescape")
        digest = hashlib.sha256(whole).hexdigest()[:KEY_HASH]
        key = key.encode()[: MAX_KEY - KEY_HASH - 1].decode("utf-8", "ignore") + "_" + digest
    return key


def part_key(key: str, part: int) -> str:
    """The key of one of several samples from an input. make_key never returns an `@`."""
    return f"{key}@{part:04d}"
