"""Nested settings as typed, frozen dataclasses: decoding, overrides, YAML, differences.

    YAML file or mapping --apply_overrides--> mapping --decode(dataclass)--> instance --dump_yaml-->

documents.py reads YAML, bounds.py has the values that numbers may have. Independent of the meaning
of the settings. Every error is a UserError that begins with the path of
the setting.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping
from functools import lru_cache
from typing import Annotated, Any, Literal, TypeVar, Union

import yaml

from d2v_ds.config.bounds import LARGEST, Bounds
from d2v_ds.config.documents import NotValid, parse_yaml, shown
from d2v_ds.errors import UserError, suggestion
from d2v_ds.secrets import mask_values

T = TypeVar("T")


def decode(kind: type[T], raw: Any, path: str = "") -> T:
    """`raw` (mappings, lists, numbers, strings) as an instance of the dataclass `kind`. path: the
    path of `raw` in the configuration. Raises UserError."""
    value: T = _decode(kind, raw, path)
    return value


def _decode(kind: Any, raw: Any, path: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _decode_dataclass(typing.cast(type, kind), raw, path)
    if origin in (Union, types.UnionType):
        return _decode_union(arguments, raw, path)
    if origin is Annotated:
        return _within(_decode(arguments[0], raw, path), arguments[1], path)
    if origin is Literal:
        if not isinstance(raw, str) or raw not in arguments:
            raise UserError(
                f"{path}: expected one of {', '.join(map(str, arguments))}, got {shown(raw)}"
            )
        return raw
    if origin is tuple:
        return _decode_tuple(arguments, raw, path)
    if origin is dict:
        if not isinstance(raw, Mapping):
            raise UserError(f"{path}: expected a mapping, got {shown(raw)}")
        return {
            str(k): _decode(arguments[1], v, f"{path}.{k}" if path else str(k))
            for k, v in raw.items()
        }
    return _decode_scalar(kind, raw, path)


@lru_cache
def _hints(kind: type) -> dict[str, Any]:
    """The types of a dataclass's fields, with their bounds."""
    return typing.get_type_hints(kind, include_extras=True)


def _within(value: Any, bounds: Bounds, path: str) -> Any:
    if not bounds.allow(value):
        raise UserError(f"{path}: must be {bounds.describe(value)}, got {shown(value)}")
    return value


def _decode_dataclass(kind: type, raw: Any, path: str) -> Any:
    if isinstance(raw, kind):
        return raw
    if not isinstance(raw, Mapping):
        raise UserError(
            f"{path or 'configuration'}: expected a mapping of settings, got {shown(raw)}"
        )
    hints = _hints(kind)
    known = [f.name for f in dataclasses.fields(kind)]
    values = {}
    for key, value in raw.items():
        where = f"{path}.{key}" if path else str(key)
        if key not in known:
            raise UserError(f"{where}: no such setting{suggestion(str(key), known)}")
        values[key] = _decode(hints[key], value, where)
    required = [
        f.name
        for f in dataclasses.fields(kind)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    for name in required:
        if name not in values:
            raise UserError(f"{path}.{name}: must be given".lstrip("."))
    try:
        return kind(**values)
    except UserError:
        raise
    except ValueError as error:  # raised by __post_init__ of a section
        raise UserError(f"{path}: {error}" if path else str(error)) from None


def _decode_union(options: tuple[Any, ...], raw: Any, path: str) -> Any:
    if raw is None and type(None) in options:
        return None
    reported: UserError | None = None  # preferably from the option whose form matches `raw`
    for option in options:
        if option is type(None):
            continue
        origin: Any = typing.get_origin(option)
        try:
            return _decode(option, raw, path)
        except UserError as error:
            if reported is None or (origin is dict) == isinstance(raw, Mapping):
                reported = error
    assert reported is not None, f"{path}: a union without options"
    raise reported


def _decode_tuple(arguments: tuple[Any, ...], raw: Any, path: str) -> Any:
    if not isinstance(raw, list | tuple):
        raise UserError(f"{path}: expected a list, got {shown(raw)}")
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return tuple(_decode(arguments[0], item, f"{path}[{i}]") for i, item in enumerate(raw))
    if len(raw) != len(arguments):
        raise UserError(f"{path}: expected {len(arguments)} values, got {len(raw)}")
    return tuple(
        _decode(a, v, f"{path}[{i}]") for i, (a, v) in enumerate(zip(arguments, raw, strict=True))
    )


MAX_FLOAT = 10**308
MAX_INTEGER = 2**63
NAMES = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}


def _decode_scalar(kind: Any, raw: Any, path: str) -> Any:
    if kind is Any:
        return raw
    if kind in (int, float) and isinstance(raw, str):  # YAML reads 1e-3 as a string
        try:
            raw = float(raw)
        except ValueError:
            pass
    if kind is float and type(raw) is int:
        raw = float(raw) if abs(raw) < MAX_FLOAT else math.inf
    if kind is int and isinstance(raw, float) and raw.is_integer():
        raw = int(raw)
    if type(raw) is not kind:
        raise UserError(f"{path}: expected {NAMES.get(kind, kind.__name__)}, got {shown(raw)}")
    if kind is float and not math.isfinite(raw):
        raise UserError(f"{path}: must be a finite number, got {raw}")
    if kind is int and not abs(raw) <= MAX_INTEGER:
        raise UserError(f"{path}: must be at most {LARGEST:,}, got {shown(raw)}")
    if kind is str and "\0" in raw:
        raise UserError(f"{path}: must not contain a NUL character, got {shown(raw)}")
    return raw


def apply_overrides(raw: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """Sets each `key.path=value` in `raw` and returns it. Values are read as YAML: 1e-3, true,
    [1, 2], a word. Raises UserError."""
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise UserError(f"{override!r}: expected key.path=value, for example optim.lr=1e-3")
        try:
            value = parse_yaml(text) if text else ""
        except NotValid as error:
            raise UserError(f"{key}: {shown(text)} is not valid YAML ({error})") from None
        *parents, last = key.split(".")
        section = raw
        for i, name in enumerate(parents):
            below = section.setdefault(name, {})
            if not isinstance(below, dict):
                raise UserError(f"{'.'.join(parents[: i + 1])}: is a value, not a section")
            section = below
        section[last] = value
    return raw


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base`, updated recursively with `over`."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        if isinstance(value, Mapping) and isinstance(below, Mapping):
            value = merge(below, value)
        merged[key] = value
    return merged


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain mappings and lists, for YAML and JSON."""
    result: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return result


def to_stored(config: Any) -> dict[str, Any]:
    """A configuration as plain mappings and lists, with *** in place of secrets: what is stored and
    printed."""
    return without_secrets(to_dict(config))


def without_secrets(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run with *** in place of secrets. Labels stay, which are no secrets."""
    stored: dict[str, Any] = mask_values(raw)
    for section, key in PLAIN:
        if isinstance(given := raw.get(section), Mapping) and key in given:
            stored[section][key] = given[key]
    return stored


PLAIN = (("finetune", "labels"),)


def dump_yaml(config: Any) -> str:
    """A configuration as YAML, in the order of its fields, without secrets."""
    return yaml.safe_dump(to_stored(config), sort_keys=False, width=100)


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """The paths at which two nested mappings differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in [*old, *(k for k in new if k not in old)]:
            where = f"{path}.{key}" if path else str(key)
            if key not in old or key not in new:
                found.append(where)
            else:
                found += differences(old[key], new[key], where)
        return found
    return [] if old == new else [path]


def value_at(raw: Any, path: str) -> Any:
    """The value at a dotted path of nested mappings; None if there is none."""
    for key in path.split("."):
        if not isinstance(raw, dict) or key not in raw:
            return None
        raw = raw[key]
    return raw
