"""Settings: YAML files, overrides, and the JSON file behind engine.config."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

from d2v_ds import recipes
from d2v_ds.config import Config, reference
from d2v_ds.config.decoding import dump_yaml
from d2v_ds.config.engine_file import load_engine_config
from d2v_ds.errors import UserError
from d2v_ds.files import resource
from d2v_ds.pretrain import Pretrain
from d2v_ds.run.preflight import check
from tests.fuzz.harness import Target
from tests.fuzz.mutations import TOKENS, any_bytes, json_values, text_lines

NAMES = ("speech_tiny", "vision_tiny_v1", "joint_tiny")
VALUES = (
    "nan", ".nan", ".inf", "-.inf", "-1", "0", "1", "2", "0.5", "1e-9", "1e9", "1e300", "1e400",
    "9" * 30, "0x" + "f" * 4000, "null", "true", "''", "x", "[]", "{}", "[1]", "[1, 2]", "[[1, 2]]",
    "{x: 1}", "{1: 2}", "{speech: 1}", "{speech: x}", "[x]", "[0.9, 0.8]", "2020-01-01",
    "2020-13-45", "!!int a", "!!binary x", "!!set {a}", "&a [*a]", "{a: 1, a: 2}", "? [1]", "\t1",
    "[" * 3000, "{a: " * 200, "'\\0'", '"\\0"', "../x", "/", "~", "pipe:", "pipe:{}", "https://",
    "x" * 5000, "speech", "cosine", "local", "\ud800", "\u2028", "%TAG", "---", "--- a\n--- b",
)  # fmt: skip


@cache
def keys() -> list[str]:
    """Every setting and section, and keys that are none."""
    sections = list(reference.flatten(reference.find("")))
    found = [path for section in sections for path in (section.path, *section_paths(section))]
    return [path for path in found if path] + ["", ".", "a..b", "optim.lr.x", "run", "modality"]


def section_paths(section: Any) -> list[str]:
    return [setting.path for setting in section.settings.values()]


def resolved(config: Config, folder: Path) -> Any:
    """What `d2v-ds train --check` does, without shard sets."""
    try:
        check(config, 1)
    except UserError as error:
        if "shard set" not in str(error):
            raise
    if config.finetune.task == "none":
        return dump_yaml(Pretrain.resolve(config))
    return dump_yaml(config)


def _files(folder: Path) -> Sequence[bytes]:
    return [dump_yaml(recipes.load(name, [])).encode() for name in NAMES]


def _read_file(data: bytes, folder: Path) -> Any:
    path = folder / "x.yaml"
    path.write_bytes(data)
    return resolved(recipes.load(str(path), [f"run.dir={folder / 'run'}"]), folder)


def _overrides(folder: Path) -> Sequence[bytes]:
    return [f"{name}\0run.dir={folder}".encode() for name in NAMES]


def _resolve(data: bytes, folder: Path) -> Any:
    name, *overrides = data.decode("utf-8", "surrogateescape").split("\0")
    return resolved(recipes.load(name, overrides), folder)


def override(data: bytes, rng: Random) -> bytes:
    """One or two more overrides, of a real setting and a hostile value."""
    found = [data]
    for _ in range(rng.choice((1, 1, 2))):
        value = rng.choice(VALUES).encode("utf-8", "surrogatepass")
        if rng.random() < 0.2:
            value = any_bytes(rng.choice((value, rng.choice(TOKENS))), rng)
        found.append(rng.choice(keys()).encode() + b"=" + value.replace(b"\0", b""))
    return b"\0".join(found)


def _engines(folder: Path) -> Sequence[bytes]:
    return [path.read_bytes() for path in sorted(resource("ds_configs").glob("*.json"))]


def _read_engine(data: bytes, folder: Path) -> Any:
    path = folder / "engine.json"
    path.write_bytes(data)
    return load_engine_config(str(path))


TARGETS = (
    Target("yaml", _files, _read_file, text_lines, (UserError,), False),
    Target("overrides", _overrides, _resolve, override, (UserError,), False),
    Target("engine.json", _engines, _read_engine, json_values, (UserError,), False),
)
