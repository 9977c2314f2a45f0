"""The content of index.json: everything in it that a reader uses is checked here, once.

    bytes --parse_set--> entries with valid types, ranges, names and totals

index.json may come from somewhere else, for example from a server. Its names become names of files
and parts of URLs and commands, so a name that is more than the name of a file is refused before it
is used. Standard library only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from d2v_ds.data.checks import OUTCOMES

FORMAT = 1
LARGEST = 2**63 - 1
FILE_NAME_BYTES = 255  # that file systems allow
SHARD_NAME_BYTES = 200  # endings are added
TEXT_LENGTH = 4096  # of other texts, such as the folder of the tars
TOTALS = ("samples", "bytes", "length")
SHA256 = re.compile("[0-9a-f]{64}")


class OtherFormat(ValueError):
    """The file was written by another version or by another program."""


def parse_set(content: bytes) -> dict[str, Any]:
    """The entries of an index.json. Raises ValueError, whose message is the fault, and OtherFormat
    if the file is not of this format at all."""
    try:
        raw = json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not valid JSON: {error}") from None
    if not isinstance(raw, dict) or raw.get("format") != FORMAT or "modality" not in raw:
        found = raw.get("format") if isinstance(raw, dict) else None
        shown = "another one" if isinstance(found, dict | list) else ascii(found)[:40]
        raise OtherFormat(f"has format {shown}, but this version reads format {FORMAT}")
    _text(raw, "modality")
    _text(raw, "unit")
    _count(raw, "sample_rate", 2**31 - 1)
    unique_fields(raw.get("fields"))
    _shards(raw)
    _about(raw)
    return raw


def plain_name(name: object, most: int = FILE_NAME_BYTES) -> str:
    """`name`, if it is the name of a file, of at most `most` bytes: no separators, no control
    characters, and neither hidden nor an option of a command. Raises ValueError."""
    if not isinstance(name, str):
        raise ValueError(f"{ascii(name)[:40]} is not a name")
    if (
        not name.isprintable()  # this excludes control characters and half surrogate pairs
        or not 0 < len(name.encode()) <= most
        or name[0] in ".-"
        or set(name) & {"/", "\\"}
    ):
        raise ValueError(
            f"{ascii(name)[:80]} is not a plain file name (at most {most} bytes, printable, "
            "without / and \\, and not beginning with . or -)"
        )
    return name


def unique_fields(fields: object) -> tuple[str, ...]:
    """The extensions of the members, as index.json and an .idx list them. Raises ValueError."""
    if not isinstance(fields, list) or not fields:
        raise ValueError("its fields are not a list of names")
    for name in fields:
        if not isinstance(name, str) or not name.isprintable() or not name or "/" in name:
            raise ValueError(f"its field {ascii(name)[:40]} is not the extension of a file")
    if len(set(fields)) < len(fields):
        raise ValueError("a field occurs twice")
    return tuple(fields)


def whole(value: object, what: str, most: int = LARGEST) -> int:
    """`value`, if it is an integer from 0 to `most`. Raises ValueError."""
    if type(value) is not int or not 0 <= value <= most:  # True is an int, but not of this type
        raise ValueError(f"{what} is {ascii(value)[:40]}, not an integer from 0 to {most}")
    return value


def _text(raw: Mapping[str, Any], key: str) -> None:
    value = raw.get(key)
    if not isinstance(value, str) or not 0 < len(value) <= TEXT_LENGTH or not value.isprintable():
        raise ValueError(f"its {key} is {ascii(value)[:40]}, not a text of printable characters")


def _count(raw: Mapping[str, Any], key: str, most: int = LARGEST) -> None:
    whole(raw.get(key), f"its {key}", most)


def _dictionary(raw: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = raw.get(key, {})
    if not isinstance(value, dict):
        raise ValueError(f"its {key} is {ascii(value)[:40]}, not an object")
    return value


def _shards(raw: Mapping[str, Any]) -> None:
    shards = raw.get("shards")
    if not isinstance(shards, list):
        raise ValueError("it has no list of shards")
    names: set[str] = set()
    for entry in shards:
        if not isinstance(entry, dict):
            raise ValueError(f"a shard is {ascii(entry)[:40]}, not an object")
        name = plain_name(entry.get("name"), SHARD_NAME_BYTES)
        if name in names:
            raise ValueError(f"it lists the shard {name} twice")
        names.add(name)
        for key in TOTALS:
            whole(entry.get(key), f"{key} of the shard {name}")
        if not isinstance(entry.get("sha256"), str) or not SHA256.fullmatch(entry["sha256"]):
            raise ValueError(f"sha256 of the shard {name} is not a SHA-256")
    for key in TOTALS:
        total = sum(entry[key] for entry in shards)
        if whole(raw.get(key), f"its {key}") != total:
            raise ValueError(f"its {key} is {raw[key]}, but its shards have {total} in total")


def _about(raw: Mapping[str, Any]) -> None:
    """The entries that describe the corpus and its conversion, as far as something reads them."""
    if "tars" in raw:
        _text(raw, "tars")
    if not isinstance(raw.get("indexed", False), bool):
        raise ValueError(f"its indexed is {ascii(raw['indexed'])[:40]}, not true or false")
    for key in ("inputs", "quarantined"):
        if key in raw:
            _count(raw, key)
    for outcome in OUTCOMES:
        for kind, number in _dictionary(raw, outcome).items():
            whole(number, f"{outcome} {ascii(kind)[:40]}")
    for key in ("remarks", "classes"):
        if not isinstance(raw.get(key, []), list):
            raise ValueError(f"its {key} is {ascii(raw[key])[:40]}, not a list")
    _dictionary(_dictionary(raw, "options"), "split")
    _tokenizer(_dictionary(raw, "tokenizer"))


def _tokenizer(tokenizer: Mapping[str, Any]) -> None:
    if tokenizer.get("file"):
        plain_name(tokenizer["file"])
    if tokenizer.get("sha256") and not SHA256.fullmatch(str(tokenizer["sha256"])):
        raise ValueError("sha256 of its tokenizer is not a SHA-256")
    for key in ("vocab_size", "pad_id", "eos_id", "mask_id"):
        if key in tokenizer:
            whole(tokenizer[key], f"{key} of its tokenizer", 2**32)
