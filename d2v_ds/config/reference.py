"""The settings as a reference: `d2v-ds settings` and docs/configuration.md.

    settings dataclasses: types, defaults, docstrings in their source --find--> Section or Setting
        --as_text--> terminal
        --as_markdown--> docs/configuration.md

The types of `model.*` and `modality.NAME.*` need torch and are imported only on request.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import textwrap
import types
import typing
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from itertools import pairwise
from typing import Any, Literal, Union

from d2v_ds.config.config import Config
from d2v_ds.config.engine_file import OWNED_BY_RUN
from d2v_ds.config.resume import MAY_CHANGE
from d2v_ds.errors import UserError, suggestion
from d2v_ds.files import resource

WIDTH = 100


@dataclass(frozen=True)
class Setting:
    """One setting."""

    path: str
    type: str
    default: str  # as written in an override
    text: str
    mapping: bool  # entries have keys: batch.size.speech


@dataclass(frozen=True)
class Section:
    """Settings with a common path. Nested sections are loaded when they are needed."""

    path: str
    text: str
    settings: dict[str, Setting]
    nested: dict[str, Callable[[], Section]]


# ---------------------------------------------------------------------------- reading dataclasses


def read(defaults: Any, path: str) -> Section:
    """The section at `path` whose defaults are this instance of a settings dataclass."""
    kind = type(defaults)
    hints, texts = typing.get_type_hints(kind), docstrings(kind)
    settings: dict[str, Setting] = {}
    nested: dict[str, Callable[[], Section]] = {}
    for field in dataclasses.fields(kind):
        name, where = field.name, join(path, field.name)
        value = getattr(defaults, name)
        if where in LAZY:
            nested[name] = LAZY[where]
        elif dataclasses.is_dataclass(value):
            nested[name] = partial(read, value, where)
        else:
            settings[name] = Setting(
                where,
                type_text(hints[name]),
                default_text(value),
                texts.get(name, ""),
                takes_mapping(hints[name]),
            )
    return Section(path, one_line(kind.__doc__ or ""), settings, nested)


# config/ imports no package above it, so these two import by name, like the registry of modalities.


def read_model() -> Section:
    return read(import_module("d2v_ds.transformer").TransformerConfig(), "model")


def read_modalities() -> Section:
    modalities = import_module("d2v_ds.modalities")

    def load(name: str) -> Section:
        return read(modalities.modality_class(name).Config(), f"modality.{name}")

    return Section("modality", "", {}, {name: partial(load, name) for name in modalities.REGISTRY})


def read_common() -> Section:
    """The settings that every modality has."""
    return read(import_module("d2v_ds.modalities.base").ModalityConfig(), "modality.NAME")


LAZY = {"model": read_model, "modality": read_modalities}


def docstrings(kind: type) -> dict[str, str]:
    """{field: the docstring under it}, including inherited fields."""
    found = {}
    for cls in filter(dataclasses.is_dataclass, reversed(kind.__mro__)):
        [tree] = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
        assert isinstance(tree, ast.ClassDef)
        for field, below in pairwise(tree.body):
            if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
                assert isinstance(field.target, ast.Name)
                found[field.target.id] = one_line(ast.literal_eval(below.value))
    return found


def type_text(kind: Any) -> str:
    """A type in words, or the allowed values."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return ", ".join(arguments[:-1]) + f" or {arguments[-1]}"
    if origin in (Union, types.UnionType):
        return " or ".join(map(type_text, arguments))
    if origin is tuple:
        number = "" if arguments[-1] is Ellipsis else f"{len(arguments)} "
        return f"list of {number}{plural(type_text(arguments[0]))}"
    if origin is dict:
        return f"mapping of names to {plural(type_text(arguments[1]))}"
    return {
        int: "integer",
        float: "number",
        bool: "true or false",
        str: "string",
        type(None): "null",
    }[kind]


def takes_mapping(kind: Any) -> bool:
    return any(typing.get_origin(one) is dict for one in (kind, *typing.get_args(kind)))


def plural(text: str) -> str:
    noun, of, rest = text.partition(" of ")
    return f"{noun}s{of}{rest}"


def default_text(value: Any) -> str:
    return value if isinstance(value, str) and value else json.dumps(value)


def join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def one_line(text: str) -> str:
    return " ".join(text.split())


# --------------------------------------------------------------------------------------- look-up


def find(path: str) -> Section | Setting:
    """The section or setting at a path; "" for the whole configuration. Raises UserError."""
    section = read(Config(), "")
    keys = path.split(".") if path else []
    for number, key in enumerate(keys, 1):
        if key in section.settings:
            setting = section.settings[key]
            if number < len(keys) and not setting.mapping:
                raise UserError(f"{setting.path}: is a value, not a section")
            return setting
        if key not in section.nested:
            known = [*section.settings, *section.nested]
            raise UserError(f"{join(section.path, key)}: no such setting{suggestion(key, known)}")
        section = section.nested[key]()
    return section


def flatten(section: Section) -> Iterator[Section]:
    """The section and all sections in it."""
    yield section
    for load in section.nested.values():
        yield from flatten(load())


# ------------------------------------------------------------------------------------ for terminals


def as_text(path: str) -> str:
    """The settings at a path and below. Raises UserError."""
    found = find(path)
    if isinstance(found, Setting):
        return setting_text(found)
    parts = []
    for section in flatten(found):
        if section.settings:
            title = f"{section.path}.*: {section.text}" if section.path else section.text
            settings = map(setting_text, section.settings.values())
            parts.append("\n\n".join([textwrap.fill(title, WIDTH), *settings]))
    return "\n\n\n".join(parts)


def setting_text(setting: Setting) -> str:
    title = f"{setting.path} ({setting.type}; default {setting.default})"
    indent = " " * 4
    text = textwrap.fill(setting.text, WIDTH, initial_indent=indent, subsequent_indent=indent)
    return f"{textwrap.fill(title, WIDTH, subsequent_indent=indent)}\n{text}"


# ---------------------------------------------------------------------- for docs/configuration.md


def as_markdown() -> str:
    """The text of docs/configuration.md."""
    whole, common = read(Config(), ""), read_common()
    parts = [introduction(), "## The whole run", table(whole.settings.values())]
    for name, load in whole.nested.items():
        if name != "modality":
            parts += [block for section in flatten(load()) for block in section_blocks(section)]
            continue
        parts += [block for section in flatten(common) for block in section_blocks(section)]
        for own in load().nested.values():
            parts += modality_blocks(own(), common)
    return "\n\n".join(parts) + "\n"


def modality_blocks(section: Section, common: Section) -> list[str]:
    """The settings that a modality adds to the common ones, or whose default it changes."""
    changed = {
        name: setting
        for name, setting in section.settings.items()
        if name not in common.settings or setting.default != common.settings[name].default
    }
    nested = {name: load for name, load in section.nested.items() if name not in common.nested}
    own = dataclasses.replace(
        section,
        text=f"{section.text} Settings that differ from `{common.path}`:",
        settings=changed,
        nested=nested,
    )
    return [block for one in flatten(own) for block in section_blocks(one)]


def section_blocks(section: Section) -> list[str]:
    return [f"## {section.path}", section.text, table(section.settings.values())]


def table(settings: Iterable[Setting]) -> str:
    rows = [
        f"| `{s.path}` | {s.type} | `{s.default}` | {s.text.replace('|', chr(92) + '|')} |"
        for s in settings
    ]
    return "\n".join(["| setting | type | default | meaning |", "|---|---|---|---|", *rows])


def introduction() -> str:
    names = sorted(path.stem for path in resource("ds_configs").glob("*.json"))
    may_change = [path if "." in path else f"{path}.*" for path in MAY_CHANGE]
    return INTRODUCTION.format(
        may_change=", ".join(f"`{path}`" for path in may_change),
        files=", ".join(f"`{name}`" for name in names),
        owned="\n".join(f"| `{key}` | {owner} |" for key, owner in OWNED_BY_RUN.items()),
    )


INTRODUCTION = """\
# Configuration

<!-- Generated by `d2v-ds settings --markdown`. Edit the docstrings under the settings, or
d2v_ds/config/reference.py, and generate it again. -->

`d2v-ds settings` prints this reference in a terminal, `d2v-ds settings optim` one section, and
`d2v-ds settings optim.lr` one setting.

## Recipes, files and overrides

A run starts from a recipe or a YAML file, changed by overrides of the form `key.path=value`:

    d2v-ds train speech_base data.shards=/shards/librispeech optim.lr=3e-4
    d2v-ds train runs/first/config.yaml run.dir=runs/second

A recipe is a named, complete configuration in `d2v_ds/recipes`; `d2v-ds recipes` lists them. A YAML
file contains the same keys as nested mappings. Settings that are given neither in the recipe or
file nor by an override have the defaults below. `d2v-ds show RECIPE key.path=value ...` prints the
resolved configuration as YAML, and the run folder stores it in `config.yaml`.

- Values are read as YAML: `1e-3`, `true`, `null`, `[0.9, 0.98]`, `{{speech: a, text: b}}`. Quote
  overrides that contain characters special to the shell.
- The setting determines the type: `run.steps=7e2` is 700, and `run.steps=1.5` is an error. An
  unknown setting, a wrong type or a value out of range is reported in one line that begins with the
  path of the setting, with exit code 2. So is a key that a YAML file gives twice. Numbers must be
  finite.
- Later overrides take precedence. `section={{...}}` replaces the whole section, and settings that
  the mapping omits have their defaults.
- `modality.NAME=null` removes a modality from a joint recipe, together with its entries in
  `data.shards`, `data.weights` and `batch.size`.
- `compat=fairseq` changes the settings that [differences.md](differences.md) lists. Other overrides
  take precedence over it.

## Resuming

`d2v-ds train` with the same run folder resumes automatically. These settings may change:
{may_change}.
Any other change is refused, with the name of the setting, unless `--allow KEY` is given.
`run.steps` is also the length of the learning-rate schedule.

## Files for engine.config

`engine.config` is `local` (plain torch in one process), a file in `ds_configs`
({files}),
or the path of your own JSON file. [ds_configs/README.md](../ds_configs/README.md) describes the
files. They contain DeepSpeed's settings for ZeRO and communication. A file must not set these keys,
which follow from the configuration of the run:

| key in the file | setting of the run |
|---|---|
{owned}"""
