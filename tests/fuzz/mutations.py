"""Random changes of an input: bytes, lines of text, and values of JSON.

Every change depends only on the generator that it is given.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from random import Random
from typing import Any

Mutate = Callable[[bytes, Random], bytes]

# Values at the borders of number types, and lengths that a reader must not believe.
NUMBERS = (0, 1, 2, 127, 128, 255, 256, 32767, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1)
TOKENS = (
    b"\x00", b"\xff", b"\n", b"\r", b"\t", b" ", b"'", b'"', b"\\", b"../", b"/", b"-1", b"1e999",
    b"nan", b"inf", b"{", b"}", b"[", b"]", b":", b",", b"#", b"&a", b"*a", b"!!python/object:x",
    b"\xed\xa0\x80", b"\xf0\x9f\x98\x80", b"9" * 400, b"[" * 3000, b"A" * 5000, b"%s", b"$(id)",
    b";id;",
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 0.5, -0.0, 2**31, 2**63, 10**400, 1e308, float("nan"),
    float("inf"), "", "x", "0", "../x", "/x", "a/b", "a\x00b", "\ud800", "x" * 70_000, [], {}, [[]],
    [None], {"": 0}, {"x": {}},
)  # fmt: skip


def any_bytes(data: bytes, rng: Random) -> bytes:
    """One to four changes anywhere."""
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        rng.choice(BYTE_CHANGES)(found, rng)
    return bytes(found)


def head_bytes(data: bytes, rng: Random, size: int = 512) -> bytes:
    """As `any_bytes`, mostly in the first `size` bytes, where formats have their headers."""
    if rng.random() < 0.3:
        return any_bytes(data, rng)
    return any_bytes(data[:size], rng) + data[size:]


def json_values(data: bytes, rng: Random) -> bytes:
    """Changes of values, keys and structure of a JSON document; sometimes of its bytes."""
    if rng.random() < 0.3:
        return any_bytes(data, rng)
    document = json.loads(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        document = _change_value(document, rng)
    return json.dumps(document).encode()


def first_line(change: Mutate) -> Mutate:
    """`change` of the first line, for formats that begin with a line of JSON; in one of three
    inputs of all bytes."""

    def mutate(data: bytes, rng: Random) -> bytes:
        line, newline, rest = data.partition(b"\n")
        if rng.random() < 0.3:
            return any_bytes(data, rng)
        return change(line, rng) + newline + rest

    return mutate


def text_lines(data: bytes, rng: Random) -> bytes:
    """Removed, repeated, exchanged and indented lines; replaced words; bytes."""
    lines = data.split(b"\n")
    for _ in range(rng.choice((1, 1, 2, 4))):
        i, j = rng.randrange(len(lines)), rng.randrange(len(lines))
        kind = rng.randrange(7)
        if kind == 0:
            lines[i], lines[j] = lines[j], lines[i]
        elif kind == 1:
            lines.insert(i, lines[j])
        elif kind == 2 and len(lines) > 1:
            del lines[i]
            continue
        elif kind == 3:
            lines[i] = rng.choice((b" ", b"  ", b"\t")) + lines[i]
        elif kind == 4:
            words = lines[i].split(b" ")
            words[rng.randrange(len(words))] = rng.choice(TOKENS)
            lines[i] = b" ".join(words)
        elif kind == 5:
            before, colon, _ = lines[i].partition(b": ")
            lines[i] = before + colon + rng.choice(TOKENS)
        else:
            lines[i] = any_bytes(lines[i], rng)
    return b"\n".join(lines)


def _change_value(document: Any, rng: Random) -> Any:
    places = list(_places(document))
    if not places:
        return deepcopy(rng.choice(VALUES))
    parent, key = rng.choice(places)
    kind = rng.randrange(6)
    if kind == 0:
        del parent[key]
    elif kind == 1 and isinstance(parent, dict):
        parent[rng.choice(("x", "", "name", "__class__", str(key) + " "))] = parent.pop(key)
    elif kind == 2:  # a value from elsewhere
        other, place = rng.choice(places)
        parent[key] = deepcopy(other[place])
    elif kind == 3 and isinstance(parent[key], int | float) and not isinstance(parent[key], bool):
        parent[key] = rng.choice((-parent[key], parent[key] + 1, rng.choice(NUMBERS)))
    elif kind == 4 and isinstance(parent, list):
        parent.insert(key, deepcopy(parent[key]))
    else:
        parent[key] = deepcopy(rng.choice(VALUES))
    return document


def _places(document: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key or position) of every value."""
    items: Any = ()
    if isinstance(document, dict):
        items = document.items()
    elif isinstance(document, list):
        items = enumerate(document)
    for key, value in items:
        yield document, key
        yield from _places(value)


# -------------------------------------------------------------------------------------- bytes


def _flip(data: bytearray, rng: Random) -> None:
    if data:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def _overwrite(data: bytearray, rng: Random) -> None:
    start, size = rng.randrange(len(data) + 1), rng.randrange(1, 9)
    data[start : start + size] = rng.randbytes(size)


def _number(data: bytearray, rng: Random) -> None:
    size, start = rng.choice((1, 2, 4, 8)), rng.randrange(len(data) + 1)
    value = rng.choice(NUMBERS) % (1 << 8 * size)
    data[start : start + size] = value.to_bytes(size, rng.choice(("little", "big")))


def _truncate(data: bytearray, rng: Random) -> None:
    del data[rng.randrange(len(data) + 1) :]


def _remove(data: bytearray, rng: Random) -> None:
    start = rng.randrange(len(data) + 1)
    del data[start : start + rng.randrange(1, 1 + max(1, len(data) // 4))]


def _repeat(data: bytearray, rng: Random) -> None:
    start, to = rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)
    data[to:to] = data[start : start + rng.randrange(1, 65)]


def _insert(data: bytearray, rng: Random) -> None:
    to = rng.randrange(len(data) + 1)
    data[to:to] = rng.choice(TOKENS)


BYTE_CHANGES: Sequence[Callable[[bytearray, Random], None]] = (
    _flip, _flip, _flip, _overwrite, _number, _number, _truncate, _remove, _repeat, _insert,
)  # fmt: skip
