"""Reads JSON: the values of a document one after the other, in bounded memory, and rows.

The document is an array, or a sequence of values that may each span several lines. A row is an
object that names no key twice.
"""

from __future__ import annotations

import codecs
import io
import json
from collections import Counter
from collections.abc import Collection, Iterator
from typing import Any

from d2v_ds.data.checks import Unusable

CHUNK = 1 << 16  # bytes that are read at a time
SPACE = " \t\r\n"


class Repeating(dict[str, Any]):
    """A JSON object that names a key twice. Python would silently keep the last value."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        self.repeated = [key for key, n in Counter(key for key, _ in pairs).items() if n > 1]

    def __str__(self) -> str:
        return _twice(self.repeated[0])


def _twice(key: str) -> str:
    return f"names {key!r} twice"


def _object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    return found if len(found) == len(pairs) else Repeating(pairs)


DECODER = json.JSONDecoder(object_pairs_hook=_object_of)


def row_of(value: Any, read: Collection[str] | None = None) -> dict[str, Any]:
    """A value of DECODER as a row. read: the keys that matter; None: all. Raises Unusable if it is
    none."""
    if not isinstance(value, dict):
        raise Unusable("row", "is not a JSON object")
    if isinstance(value, Repeating):
        for key in value.repeated:
            if read is None or key in read:
                raise Unusable("row", _twice(key))
    return value


def values(file: io.BufferedReader, longest: int, errors: str = "surrogateescape") -> Iterator[Any]:
    """The elements of arrays, and other values. longest: of a value, in bytes. errors: what becomes
    of bytes that are not UTF-8, as for bytes.decode; by default half a surrogate pair, so that only
    the value with it is refused. Raises Unusable, after the values before, if the rest cannot be
    read; UnicodeDecodeError if `errors` is "strict"."""
    stream = _Stream(file, errors)
    inside = False  # an array
    while character := stream.next_character():
        if character == "[" and not inside:
            inside = True
            stream.at += 1
        elif character == "]" and inside:
            inside = False
            stream.at += 1
        elif character == ",":
            stream.at += 1
        else:
            yield stream.value(longest)
    if inside:
        raise Unusable("truncated", "ends before the end of its array")


class _Stream:
    """The text of a file from `at` on."""

    def __init__(self, file: io.BufferedReader, errors: str) -> None:
        self.file, self.text, self.at, self.ended = file, "", 0, False
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")(errors)

    def next_character(self) -> str:
        """The next character that is not white space; "" at the end."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in SPACE:
                self.at += 1
            if self.at < len(self.text):
                return self.text[self.at]
            if self.ended:
                return ""
            self.more(CHUNK)

    def more(self, size: int) -> None:
        data = self.file.read(size)
        self.ended = not data
        self.text = self.text[self.at :] + self.decoder.decode(data, final=self.ended)
        self.at = 0

    def value(self, longest: int) -> Any:
        """Reads twice as much until the value is complete, so that the time is linear."""
        while True:
            try:
                value, end = DECODER.raw_decode(self.text, self.at)
            except RecursionError as error:
                raise Unusable("row", f"is not JSON ({error})") from None
            except json.JSONDecodeError as error:
                if self.ended:
                    reason = f"is not JSON ({error.msg}); what follows cannot be read"
                    raise Unusable("row", reason) from None
            else:
                if end < len(self.text) or self.ended:  # a number may go on
                    self.at = end
                    return value
            if len(self.text) - self.at > longest:
                raise Unusable("size", f"a value is longer than {longest:,} bytes, or is not JSON")
            self.more(max(CHUNK, len(self.text) - self.at))
