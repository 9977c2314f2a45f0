"""Keys of samples: what a path or a name becomes, so that every WebDataset reader takes it."""

from __future__ import annotations

import hashlib
import os
import re

MAX_KEY = 88  # bytes: with `@0000` and its extension a key still fits the 100 of a tar header
KEY_HASH = 12  # hex digits
PLAIN = re.compile(
    r"(?!__)[A-Za-z0-9_-]+(?:/[A-Za-z0-9_-]+)*"
)  # what is a key as it is, as most are


def make_key(text: str, apart: str = "") -> str:
    """A WebDataset key from a path without its extension: letters, digits, `_`, `-` and `/`.

    webdataset cuts a name at the first dot and skips names that begin with two underscores. Keys
    that are too long for a tar header, or are to be told `apart`, end in a hash.
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
    """Of one of several samples that an input gives: `@` is in no key that make_key makes."""
    return f"{key}@{part:04d}"
