"""Decoding of nested settings: types, overrides, YAML, differences."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from d2v_ds.config import Config
from d2v_ds.config.decoding import (
    apply_overrides,
    decode,
    differences,
    dump_yaml,
    to_dict,
    value_at,
)
from d2v_ds.config.documents import load_yaml
from d2v_ds.errors import UserError
from tests.config.helpers import load


@dataclass(frozen=True)
class Inner:
    size: int
    kinds: tuple[Literal["a", "b"], ...] = ()

    def __post_init__(self) -> None:
        if self.size < 0:
            raise ValueError(f"size={self.size} must be 0 or more")


@dataclass(frozen=True)
class Outer:
    inner: Inner = field(default_factory=lambda: Inner(1))
    shares: float | dict[str, float] = 1.0
    limit: int | None = None
    more: dict[str, Any] = field(default_factory=dict)


def test_overrides_are_typed_by_the_setting() -> None:
    config = load("optim.lr=1e-3", "optim.betas=[0.8, 0.9]", "log.progress=false", "run.steps=7e2")
    assert config.optim.lr == 0.001
    assert config.optim.betas == (0.8, 0.9)
    assert config.log.progress is False
    assert config.run.steps == 700


def test_nested_values() -> None:
    raw = {"inner": {"size": 2.0, "kinds": ["a", "b"]}, "shares": {"x": 1}, "more": {"y": [1]}}
    assert decode(Outer, raw) == Outer(Inner(2, ("a", "b")), {"x": 1.0}, None, {"y": [1]})
    assert decode(Outer, {"inner": Inner(5), "limit": None}).inner == Inner(5)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ([], "configuration: expected a mapping of settings, got []"),
        ({"inner": 3}, "inner: expected a mapping of settings, got 3"),
        ({"inner": {}}, "inner.size: must be given"),
        ({"inner": {"size": -1}}, "inner: size=-1 must be 0 or more"),
        ({"inner": {"size": 1, "kinds": ["a", "c"]}}, "inner.kinds[1]: expected one of a, b, got"),
        ({"inner": {"size": 1, "kinds": "ab"}}, "inner.kinds: expected a list, got 'ab'"),
        ({"shares": {"x": "y"}}, "shares.x: expected a number, got 'y'"),
        ({"shares": "y"}, "shares: expected a number, got 'y'"),
        ({"limit": 0.5}, "limit: expected an integer, got 0.5"),
        ({"more": 1}, "more: expected a mapping, got 1"),
    ],
)
def test_an_error_begins_with_the_path(raw: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        decode(Outer, raw)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.learning=1", "optim.learning: no such setting"),
        ("optim.lrr=1", "optim.lrr: no such setting; did you mean 'lr'?"),
        ("optimm.lr=1", "optimm: no such setting; did you mean 'optim'?"),
        ("optim.lr=fast", "optim.lr: expected a number, got 'fast'"),
        ("run.steps=1.5", "run.steps: expected an integer, got 1.5"),
        ("run.steps=true", "run.steps: expected an integer, got True"),
        ("log.progress=1", "log.progress: expected true or false, got 1"),
        ("optim.schedule=cosin", "optim.schedule: expected one of cosine, tri_stage, constant"),
        ("optim.betas=[0.9]", "optim.betas: expected 2 values, got 1"),
        ("optim.lr.x=1", "optim.lr: is a value, not a section"),
        ("optim.lr", "'optim.lr': expected key.path=value"),
        ("optim.betas=[0.9", "optim.betas: '[0.9' is not valid YAML"),
    ],
)
def test_a_wrong_setting_is_named_with_what_is_allowed(override: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load(override)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_overrides_change_only_the_named_settings() -> None:
    raw = apply_overrides({"a": {"b": 1, "c": 2}}, ["a.b=3", "d.e=", "a.b=4", "f={g: [1, x]}"])
    assert raw == {"a": {"b": 4, "c": 2}, "d": {"e": ""}, "f": {"g": [1, "x"]}}


def test_yaml_reads_scientific_numbers_as_strings_and_decoding_converts_them() -> None:
    assert yaml.safe_load("1e-3") == "1e-3"
    assert decode(Config, {"optim": {"lr": "1e-3"}}).optim.lr == 1e-3


def test_a_dumped_configuration_loads_unchanged() -> None:
    config = load("optim.betas=[0.8, 0.9]", "data.shards={speech/a: /a, speech/b: /b}")
    assert decode(Config, yaml.safe_load(dump_yaml(config))) == config
    assert to_dict(config)["optim"]["betas"] == [0.8, 0.9]


def test_files_that_are_not_a_configuration(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.yaml: no such file"):
        load_yaml(tmp_path / "none.yaml")
    bad = tmp_path / "bad.yaml"
    bad.write_text("a: [")
    with pytest.raises(UserError, match=r"bad\.yaml: not valid YAML"):
        load_yaml(bad)
    bad.write_bytes(b"a: \xff")
    with pytest.raises(UserError, match=r"bad\.yaml: not valid YAML"):
        load_yaml(bad)
    bad.write_text("- 1")
    with pytest.raises(UserError, match="expected a mapping of settings"):
        load_yaml(bad)


def test_differences_are_paths() -> None:
    old = {"a": {"b": 1, "c": 2}, "gone": 0}
    assert differences(old, {"a": {"b": 1, "c": 3}, "d": 4}) == ["a.c", "gone", "d"]
    assert value_at(old, "a.c") == 2
    assert value_at(old, "a.x") is None and value_at(old, "a.b.c") is None
