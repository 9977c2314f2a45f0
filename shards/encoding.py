"""Recognises files that are not UTF-8 text by their first bytes, so that they are refused as a
whole. Read line by line, UTF-16 passes as text with a NUL behind each letter."""

from __future__ import annotations

import codecs

from d2v_ds.data.checks import Unusable

HEAD = 4_096  # bytes that are examined
BOM = codecs.BOM_UTF8
# UTF-32 first, because its mark begins with that of UTF-16.
MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
# Without a mark: (codec, name for iconv).
WIDE = (
    ("utf-32-le", "UTF-32LE"),
    ("utf-32-be", "UTF-32BE"),
    ("utf-16-le", "UTF-16LE"),
    ("utf-16-be", "UTF-16BE"),
)
USUAL = frozenset(" \t\r\n.,0123456789、。，")  # characters that a page of any script contains


def check_head(head: bytes) -> None:
    """Raises Unusable if a file that begins with these bytes is UTF-16 or UTF-32, or is not text:
    it has NUL bytes and is not UTF-8."""
    for mark, name in MARKS.items():
        rest = head.removeprefix(mark)
        if rest != head and (b"\0" in rest or not _is_utf8(rest)):
            raise _other_encoding(name)
    if b"\0" not in head:
        return
    valid = _is_utf8(head)  # as English in UTF-16 is
    share, name = max((_usual(head, codec), name) for codec, name in WIDE)
    if share > (0.5 if valid else 0.02):
        raise _other_encoding(name)
    if not valid:
        raise Unusable("format", "is not text: it has NUL bytes and is not UTF-8")


def check_text(text: str) -> None:
    """Raises Unusable for a document with NUL characters."""
    if "\0" in text:
        raise Unusable("encoding", "has NUL characters, which text does not have; remove them")


def _other_encoding(name: str) -> Unusable:
    return Unusable("encoding", f"is {name}; convert it: iconv -f {name} -t UTF-8")


def _usual(head: bytes, codec: str) -> float:
    """The share of usual characters, if the bytes are in this encoding and have no NUL character;
    otherwise 0."""
    width = 4 if "32" in codec else 2
    whole = head[: len(head) // width * width]
    try:
        # The last character may be cut.
        text, _ = codecs.getdecoder(codec)(whole, "strict")
    except UnicodeDecodeError as error:
        if error.end < len(whole):
            return 0.0
        text = whole[: error.start].decode(codec)
    if not text or "\0" in text:
        return 0.0
    return sum(character in USUAL or character.isascii() for character in text) / len(text)


def _is_utf8(head: bytes) -> bool:
    try:
        codecs.getincrementaldecoder("utf-8")("strict").decode(head)
    except UnicodeDecodeError:
        return False
    return True
