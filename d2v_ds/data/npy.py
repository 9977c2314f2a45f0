"""Token ids in .npy files: arrays of one or two dimensions of uint16 or uint32.

    bytes --header--> Header(type, shape, first byte of the ids)

The header is the text of a dictionary (numpy.lib.format, versions 1 to 3). numpy evaluates it as
Python, which damaged text ends with errors of many types, and allocates the array that it states.
Here, it is matched against the form that numpy writes, and compared with the bytes that are there.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import NamedTuple

from d2v_ds.data.checks import Unusable

MAGIC = b"\x93NUMPY"
LONGEST = 1 << 12  # bytes of the text; numpy writes 118 for one or two dimensions
WIDTHS = {"<u2": 2, "<u4": 4}  # bytes of an id, by numpy's name of the type
ENTRY = r"""\s*(?:'|")(descr|fortran_order|shape)(?:'|")\s*:\s*('[^']*'|"[^"]*"|\w+|\([\d\s,]*\))"""
HEADER = re.compile(rf"\s*\{{{ENTRY}\s*,{ENTRY}\s*,{ENTRY}\s*,?\s*\}}\s*")
UNREADABLE = "cannot be read as a .npy array"
DIGITS = 15  # of the length of a dimension


class Header(NamedTuple):
    kind: str  # of an id, a key of WIDTHS
    shape: tuple[int, ...]
    start: int  # byte of the first id


def header(peek: Callable[[int, int], bytes], total: int, dimensions: int = 1) -> Header:
    """The header of a file of `total` bytes. peek: (first byte, number) -> bytes. Raises Unusable
    if it is not an array of ids of this number of dimensions that fills the file."""
    head = peek(0, 12)
    if head[:6] != MAGIC or head[6:7] not in (b"\1", b"\2", b"\3"):
        raise _unreadable("it does not begin as one")
    first = 10 if head[6] == 1 else 12
    size = int.from_bytes(head[8:first], "little")
    if first + size > total:
        raise Unusable("truncated", f"{UNREADABLE} (it ends within its header)")
    found = HEADER.fullmatch(peek(first, size).decode("latin-1")) if size <= LONGEST else None
    entries = dict(zip(found.groups()[::2], found.groups()[1::2], strict=True)) if found else {}
    if len(entries) != 3 or entries["shape"][:1] != "(":
        raise _unreadable("its header does not describe numbers")
    kind, lengths = entries["descr"].strip("\"'"), entries["shape"].strip("()").split(",")
    sizes = [text.strip() for text in lengths if text.strip()]
    if any(not text.isdigit() or len(text) > DIGITS for text in sizes):
        raise _unreadable("its shape does not consist of numbers")
    shape = tuple(map(int, sizes))
    if kind not in WIDTHS or len(shape) != dimensions or entries["fortran_order"] != "False":
        expected = "one dimension" if dimensions == 1 else f"{dimensions} dimensions"
        raise Unusable(
            "format",
            f"holds {_usual(kind)} of shape {shape}, expected {expected} of uint16 or uint32 "
            "token ids",
        )
    if dimensions > 1 and not all(shape):
        raise Unusable("empty", "holds no token ids")
    needed = first + size + math.prod(shape) * WIDTHS[kind]
    if needed > total:
        reason = f"{UNREADABLE} (it is truncated: it has {total} of {needed} bytes)"
        raise Unusable("truncated", reason)
    if needed < total:
        raise Unusable(
            "length", f"has {total - needed} bytes behind the ids that its header states"
        )
    return Header(kind, shape, first + size)


def header_of(data: bytes, dimensions: int = 1) -> Header:
    """As `header`, of the bytes of a file."""
    return header(lambda at, number: data[at : at + number], len(data), dimensions)


def _unreadable(reason: str) -> Unusable:
    return Unusable("damaged", f"{UNREADABLE} ({reason})")


def _usual(kind: str) -> str:
    """The usual name of a type, such as int64 for <i8."""
    names = {"u": "uint", "i": "int", "f": "float"}
    is_number = kind[:1] == "<" and kind[1:2] in names and kind[2:].isdigit() and len(kind) == 3
    return f"{names[kind[1]]}{8 * int(kind[2])}" if is_number else kind[:20]
