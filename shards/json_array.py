"""Reads the values of a JSON document one after the other, in bounded memory.

The document is an array, or a sequence of values that may each span several lines.
"""

from __future__ import annotations

import codecs
import io
import json
from collections.abc import Iterator
from typing import Any

from d2v_ds.data.checks import Unusable

CHUNK = 1 << 16  # bytes that are read at a time
SPACE = " \t\r\n"
DECODER = json.JSONDecoder()


def values(
    file: io.BufferedReader,
    longest: int,
    decoder: json.JSONDecoder = DECODER,
    errors: str = "surrogateescape",
) -> Iterator[Any]:
    """The elements of arrays, and other values. longest: of a value, in bytes. errors: what becomes
    of bytes that are not UTF-8, as for bytes.decode; by default half a surrogate pair, so that only
    the value with it is refused. Raises Unusable, after the values before, if the rest cannot be
    read; UnicodeDecodeError if `errors` is "strict"."""
    stream = _Stream(file, decoder, errors)
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

    def __init__(
        self, file: io.BufferedReader, json_decoder: json.JSONDecoder, errors: str
    ) -> None:
        self.file, self.text, self.at, self.ended = file, "", 0, False
        self.json_decoder = json_decoder
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
                value, end = self.json_decoder.raw_decode(self.text, self.at)
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
