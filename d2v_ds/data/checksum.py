"""Checksums of samples, named in the index that holds them: bytes -> 32 bits.

xxh3 costs a tenth of reading; crc32 of the standard library stands in for it where a set is written
without the package xxhash.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

from d2v_ds.errors import UserError

try:
    import xxhash
except ImportError:
    xxhash = None  # type: ignore[assignment]

Checksum = Callable[[Any], int]  # of bytes or a view of bytes

NONE = "none"  # of sets that others made
BEST = "xxh3" if xxhash else "crc32"  # what is written


def xxh3(data: Any) -> int:
    """The low 32 bits of XXH3-64."""
    return xxhash.xxh3_64_intdigest(data) & 0xFFFF_FFFF


def checksum_of(kind: str) -> Checksum | None:
    """The function by its name; None where the name is "none". Raises UserError."""
    if kind == NONE:
        return None
    if kind == "crc32":
        return zlib.crc32
    if kind != "xxh3":
        raise UserError(f"checksum {kind!r}: this version knows xxh3, crc32 and none")
    if xxhash is None:
        raise UserError("checksum 'xxh3': needs the package xxhash; install it")
    return xxh3
