"""YAML and JSON written by people: files and the values of overrides.

    bytes --yaml nodes, checked--> plain mappings with text keys, lists, numbers and strings

Stricter than the libraries: keys are text and given once, and neither size, nesting nor aliases
make a short text large. Every error is one UserError that names the file and the line.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from d2v_ds.errors import UserError

MAX_BYTES = 10_000_000  # of a file; a configuration with 20,000 labels has 400 kB
MAX_VALUES = 200_000  # in a document, with its aliases written out
MAX_DEPTH = 50
OPENERS = re.compile(rf"(?:[\[{{]\s*){{{MAX_DEPTH + 1}}}")
MERGE = "tag:yaml.org,2002:merge"
TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null")}


class NotValid(ValueError):
    """A document that cannot be used; says what and where."""


def read_document(path: Path, kind: str, most: int = MAX_BYTES) -> str:
    """The text of a file. kind: what it is, for messages; most: bytes. Raises UserError."""
    try:
        with path.open("rb") as file:
            data = file.read(most + 1)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read ({reason})") from None
    if len(data) > most:
        raise UserError(
            f"{path}: has more than {most // 1_000_000} MB, so it is not {kind}; name another file"
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not valid {kind.split()[-1]} (byte {error.start} is not UTF-8)"
        ) from None


# --------------------------------------------------------------------------------------------- YAML


def load_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises UserError that names the file."""
    text = read_document(path, "a configuration in YAML")
    try:
        raw = parse_yaml(text)
    except NotValid as error:
        raise UserError(f"{path}: not valid YAML ({error})") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: expected a mapping of settings at the top")
    return raw


def parse_yaml(text: str) -> Any:
    """The value of a YAML document. Raises NotValid."""
    if OPENERS.search(text):  # the library takes seconds for thousands of them
        raise NotValid(f"nested more than {MAX_DEPTH} levels deep")
    loader = None
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _Size().check(node)
        return _value(node, loader)
    except yaml.MarkedYAMLError as error:
        raise NotValid(_problem(error)) from None
    except yaml.YAMLError as error:  # characters that YAML excludes
        raise NotValid(str(error).splitlines()[0]) from None
    except RecursionError:  # each level of nesting is a call
        raise NotValid(f"nested more than {MAX_DEPTH} levels deep") from None
    finally:
        if loader is not None:
            loader.dispose()


def _problem(error: yaml.MarkedYAMLError) -> str:
    problem, mark = error.problem or "damaged", error.problem_mark
    if "\\t" in problem:
        problem += "; indent with spaces"
    return f"{_line(mark)}: {problem}" if mark else problem


def _line(mark: Any) -> str:
    return f"line {mark.line + 1}, column {mark.column + 1}"


class _Size:
    """Refuses documents that are too deep or, with aliases written out, too large."""

    def __init__(self) -> None:
        self.sizes: dict[int, int] = {}  # of nodes that are complete
        self.open: set[int] = set()

    def check(self, node: yaml.Node, depth: int = 1) -> int:
        """The number of values in a node, which is met once for each alias."""
        known = id(node)
        if known in self.open:
            raise NotValid(f"{_line(node.start_mark)}: a value contains itself")
        if depth > MAX_DEPTH:
            raise NotValid(f"{_line(node.start_mark)}: nested more than {MAX_DEPTH} levels deep")
        if known not in self.sizes:
            self.open.add(known)
            below = [] if isinstance(node, yaml.ScalarNode) else node.value
            if isinstance(node, yaml.MappingNode):
                below = [one for pair in node.value for one in pair]
            self.sizes[known] = 1 + sum(self.check(one, depth + 1) for one in below)
            self.open.remove(known)
        if self.sizes[known] > MAX_VALUES:
            raise NotValid(
                f"{_line(node.start_mark)}: more than {MAX_VALUES:,} values, with aliases written "
                "out"
            )
        return self.sizes[known]


def _value(node: yaml.Node, loader: yaml.SafeLoader) -> Any:
    """The value of a node. Aliases become copies, so that a change of one leaves the others."""
    if isinstance(node, yaml.SequenceNode) and node.tag == "tag:yaml.org,2002:seq":
        return [_value(one, loader) for one in node.value]
    if isinstance(node, yaml.MappingNode) and node.tag == "tag:yaml.org,2002:map":
        return _mapping(node, loader)
    if isinstance(node, yaml.ScalarNode) and node.tag in TAGS:
        try:
            return loader.construct_object(node)
        except (ValueError, KeyError, IndexError):  # `!!int a`, `!!bool x`, `0b`
            kind = node.tag.rpartition(":")[2]
            raise NotValid(f"{_line(node.start_mark)}: {node.value[:40]!r} is not {kind}") from None
    if isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:timestamp":
        raise NotValid(
            f"{_line(node.start_mark)}: {node.value[:40]} is read as a date; put it in quotes"
        )
    raise NotValid(f"{_line(node.start_mark)}: the tag {node.tag} is not allowed; remove it")


def _mapping(node: yaml.MappingNode, loader: yaml.SafeLoader) -> dict[str, Any]:
    merged, own = dict[str, Any](), dict[str, Any]()
    for key_node, value_node in node.value:
        value = _value(value_node, loader)
        if key_node.tag == MERGE:
            for section in reversed(value if isinstance(value, list) else [value]):
                if not isinstance(section, dict):
                    raise NotValid(f"{_line(key_node.start_mark)}: << needs a mapping")
                merged.update(section)
            continue
        key = _value(key_node, loader)
        if not isinstance(key, str):
            raise NotValid(
                f"{_line(key_node.start_mark)}: the key {shown(key)} is not text; put it in quotes"
            )
        if key in own:
            raise NotValid(
                f"{_line(key_node.start_mark)}: {shown(key)} is given twice in one mapping; keep "
                "one of them"
            )
        own[key] = value
    return {**merged, **own}


# --------------------------------------------------------------------------------------------- JSON


def load_json(path: Path, kind: str, most: int = MAX_BYTES) -> dict[str, Any]:
    """The object in a JSON file. kind, most: as for `read_document`. Raises UserError that names
    the file."""
    text = read_document(path, kind, most)
    try:
        raw = json.loads(text, object_pairs_hook=_unique)
    except NotValid as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
    except (ValueError, RecursionError) as error:  # ValueError: also a number with many digits
        raise UserError(f"{path}: not valid JSON ({str(error) or 'nested too deeply'})") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: expected a JSON object")
    return raw


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for i, key in enumerate(keys) if key in keys[:i])
        raise NotValid(f"{shown(twice)} is given twice in one object; keep one of them")
    return found


# ---------------------------------------------------------------------------------------- messages


def shown(value: Any, length: int = 100) -> str:
    """A value for a message: its repr, on one line and cut."""
    if isinstance(value, int) and abs(value) >= 10**30:
        return f"{'-' * (value < 0)}an integer of {abs(value).bit_length() // 3.32:.0f} digits"
    if isinstance(value, Mapping | list | tuple) and len(value) > 20:
        return f"a {'mapping' if isinstance(value, Mapping) else 'list'} of {len(value)} values"
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # nested values; an integer with thousands of digits
        text = f"a {type(value).__name__}"
    return text if len(text) <= length else f"{text[: length - 4]} ..."
