"""32-bit checksums of samples. The index that contains them names the kind.

xxh3 costs little compared with reading (docs/performance.md). crc32, from the standard library,
is used for sets that are written without the package xxhash.
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

NONE = "none"  # of third-party tars
BEST = "xxh3" if xxhash else "crc32"  # the kind that is written


def xxh3(data: Any) -> int:
    """The low 32 bits of XXH3-64."""
    return xxhash.xxh3_64_intdigest(data) & 0xFFFF_FFFF


def checksum_of(kind: str) -> Checksum | None:
    """The function of this name; None for "none". Raises UserError."""
    if kind == NONE:
        return None
    if kind == "crc32":
        return zlib.crc32
    if kind != "xxh3":
        raise UserError(f"checksum {kind!r}: this version supports xxh3, crc32 and none")
    if xxhash is None:
        raise UserError("checksum 'xxh3': needs the package xxhash; install it")
    return xxh3
