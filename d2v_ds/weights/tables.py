"""Tables that pair settings of ours with those of another implementation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from d2v_ds.config.decoding import value_at
from d2v_ds.errors import UserError

Settings = dict[str, Any]
Table = Mapping[str, "str | tuple[str, Callable[[Any], Any]]"]
"""{our path: their path, or (their path, function of their value)}."""

NULLABLE = ("loss_scale", "max_patches")  # settings of ours in which null has a meaning


def take(table: Table, theirs: Settings, ours: Settings | None = None) -> Settings:
    """The settings of a table that `theirs` has, added to `ours`. Raises UserError for a value that
    cannot be converted."""
    ours = {} if ours is None else ours
    for path, source in table.items():
        where, convert = source if isinstance(source, tuple) else (source, None)
        value = value_at(theirs, where)
        if value is None and not (path.endswith(NULLABLE) and given(theirs, where)):
            continue
        try:
            put(ours, path, convert(value) if convert else value)
        except (ValueError, TypeError) as error:
            raise UserError(f"{where}: {error}") from None
    return ours


def given(settings: Settings, path: str) -> bool:
    parent, _, key = path.rpartition(".")
    section = value_at(settings, parent) if parent else settings
    return isinstance(section, dict) and key in section


def put(settings: Settings, path: str, value: Any) -> None:
    *sections, key = path.split(".")
    for name in sections:
        settings = settings.setdefault(name, {})
    settings[key] = value
