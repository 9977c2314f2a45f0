"""The settings that may change when a run resumes."""

from __future__ import annotations

import pytest

from d2v_ds.config import Config
from d2v_ds.config.decoding import to_dict, value_at
from d2v_ds.config.resume import MAY_CHANGE, refuse_changes
from d2v_ds.errors import UserError
from tests.config.helpers import load


def test_some_changes_are_allowed_and_the_others_listed() -> None:
    old = to_dict(load())
    assert refuse_changes(old, to_dict(load("run.steps=500", "engine.config=zero3"))) == []
    with pytest.raises(UserError) as caught:
        refuse_changes(old, to_dict(load("optim.lr=2e-3", "model.depth=5")))
    message = str(caught.value)
    assert "model.depth was 4, is 5" in message and "optim.lr was 0.001, is 0.002" in message
    assert "--allow model.depth" in message and "\n" not in message


def test_changes_can_be_allowed_by_setting_or_section() -> None:
    old, changed = to_dict(load()), to_dict(load("optim.lr=2e-3"))
    assert refuse_changes(old, changed, ("optim.lr",)) == ["optim.lr"]
    assert refuse_changes(old, changed, ("optim",)) == ["optim.lr"]
    with pytest.raises(UserError):
        refuse_changes(old, changed, ("opti", "optim.l"))  # no prefixes of names


def test_many_changes_are_shortened() -> None:
    more = ["optim.lr=2e-3", "optim.eps=1e-7", "run.seed=1", "model.depth=5", "model.heads=2"]
    changed = to_dict(load(*more, "target.top_k=2", "teacher.decay=0.5"))
    with pytest.raises(UserError) as caught:
        refuse_changes(to_dict(load()), changed)
    assert str(caught.value).count(" was ") == 5 and "; ..." in str(caught.value)


def test_settings_that_may_change_exist() -> None:
    whole = to_dict(Config(model={"checkpoint_activations": False}))
    assert all(value_at(whole, path) is not None for path in MAY_CHANGE)
