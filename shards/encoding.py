"""Recognises text that is not UTF-8, and says how to convert it.

A file in UTF-16 is recognised by its first bytes and refused as a whole: read line by line, it
passes as text with a NUL behind each letter. Other encodings are recognised document by document.
"""

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


def not_utf8(data: bytes, start: int) -> Unusable:
    """About a document that is not UTF-8 at its byte `start`: in what encoding it seems to be."""
    high = sum(byte >= 0x80 for byte in data)
    rest = data.decode(errors="ignore")
    valid = sum(byte >= 0x80 for byte in rest.encode())
    if valid > high - valid:  # in other encodings, only a few characters are UTF-8 by chance
        return Unusable(
            "encoding",
            f"is not UTF-8 at its byte {start} but elsewhere, so it is damaged or mixed; remove "
            "what is not UTF-8: iconv -c -f UTF-8 -t UTF-8",
        )
    name = "LATIN1"
    if any(0x80 <= byte < 0xA0 for byte in data):
        name = "WINDOWS-1252" if _is(data, "cp1252") else ""
    # Most letters of a European language are ASCII.
    if not name or high > sum(map(str.isalpha, rest)):
        return Unusable(
            "encoding",
            f"is not UTF-8 at its byte {start}; convert the file from its encoding, for example "
            "from GB18030: iconv -f GB18030 -t UTF-8",
        )
    return Unusable(
        "encoding",
        f"is not UTF-8 at its byte {start}; convert the file, for example: "
        f"iconv -f {name} -t UTF-8",
    )


def check_unicode(text: str) -> None:
    """Raises Unusable for a document with halves of surrogate pairs, such as bytes that were not
    UTF-8 have become."""
    if text.isascii():  # which Python knows without looking
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        if "\udc80" <= text[error.start] <= "\udcff":
            start = len(text[: error.start].encode())
            raise not_utf8(text.encode(errors="surrogateescape"), start) from None
        raise Unusable("encoding", f"is not Unicode text ({error.reason})") from None


def check_text(text: str) -> None:
    """As `check_unicode`; also raises Unusable for a document with NUL characters."""
    check_unicode(text)
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
    """Whether they are the beginning of UTF-8."""
    return _is(head, "utf-8")


def _is(head: bytes, codec: str) -> bool:
    try:
        codecs.getincrementaldecoder(codec)("strict").decode(head)
    except UnicodeDecodeError:
        return False
    return True
