"""The DeepSpeed settings behind engine.config."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from d2v_ds.config.engine_file import OWNED_BY_RUN, engine_config_file, load_engine_config
from d2v_ds.errors import UserError


@pytest.mark.parametrize("key", OWNED_BY_RUN)
def test_a_key_with_two_owners_is_refused(tmp_path: Path, key: str) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}, key: 1}))
    with pytest.raises(UserError, match=f"sets {key}, but the run configuration owns it") as caught:
        load_engine_config(str(path))
    assert OWNED_BY_RUN[key] in str(caught.value)


def test_a_name_or_a_path(tmp_path: Path) -> None:
    assert load_engine_config("zero3")["zero_optimization"]["stage"] == 3
    path = tmp_path / "mine.json"
    path.write_text('{"zero_optimization": {"stage": 1}}')
    assert load_engine_config(str(path)) == {"zero_optimization": {"stage": 1}}
    assert engine_config_file("local") is None and load_engine_config("local") == {}


def test_errors_are_named(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"'zero4' is neither a JSON file nor one of local, .*did you mean 'zero"
    ):
        load_engine_config("zero4")
    path = tmp_path / "mine.json"
    path.write_text("{")
    with pytest.raises(UserError, match=r"mine\.json: not valid JSON"):
        load_engine_config(str(path))
    path.write_text("[]")
    with pytest.raises(UserError, match=r"mine\.json: expected a JSON object"):
        load_engine_config(str(path))
