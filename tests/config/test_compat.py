"""compat=fairseq: the settings that reproduce the original code."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from d2v_ds import recipes
from d2v_ds.config import Config
from d2v_ds.config.compat import FAIRSEQ, apply_compat
from d2v_ds.config.decoding import value_at
from d2v_ds.pretrain import Pretrain
from tests import ROOT


def load(recipe: str, *overrides: str) -> Config:
    return recipes.load(recipe, list(overrides))


@pytest.mark.parametrize("recipe", ["speech_base", "vision_base", "text_base", "text_base_v1"])
def test_the_optimizer_matches_fairseq(recipe: str) -> None:
    plain, faithful = load(recipe), load(recipe, "compat=fairseq")
    assert (plain.optim.decay_all, plain.optim.adam_eps) == (False, "torch")
    assert (faithful.optim.decay_all, faithful.optim.adam_eps) == (True, "fairseq")
    with torch.device("meta"):
        Pretrain.create(faithful)


def test_each_modality_has_its_settings() -> None:
    assert load("speech_base", "compat=fairseq").modality["speech"]["padded_statistics"] is True
    assert load("vision_base", "compat=fairseq").modality["vision"]["cls_views"] is None
    text = load("text_base_v1", "compat=fairseq").modality["text"]
    assert text["text_teacher"] == "masked" and text["padded_statistics"] is True
    assert "text_teacher" not in load("text_base", "compat=fairseq").modality["text"]
    assert set(load("speech_base", "compat=fairseq").modality) == {"speech"}


def test_other_overrides_win_over_it() -> None:
    kept = load("text_base_v1", "modality.text.text_teacher=whole", "compat=fairseq")
    assert kept.modality["text"]["text_teacher"] == "whole" and kept.optim.decay_all


def test_in_a_file_it_fills_in_what_the_file_omits() -> None:
    def settings() -> dict[str, Any]:
        given = {"text": {"masked": "replaced", "text_teacher": "whole"}}
        return {"compat": "fairseq", "optim": {"decay_all": False}, "modality": given}

    filled, replaced, plain = settings(), settings(), settings() | {"compat": "none"}
    for raw, over in ((filled, False), (replaced, True), (plain, True)):
        apply_compat(raw, over=over)
    assert filled["optim"] == {"decay_all": False, "adam_eps": "fairseq"}
    assert filled["modality"]["text"]["text_teacher"] == "whole"
    assert replaced["optim"] == {"decay_all": True, "adam_eps": "fairseq"}
    assert replaced["modality"]["text"]["text_teacher"] == "masked"
    assert plain == settings() | {"compat": "none"}


def test_every_setting_is_documented_and_differs_from_the_default() -> None:
    page = (ROOT / "docs" / "differences.md").read_text()
    for path, value in FAIRSEQ.items():
        section, _, key = path.rpartition(".")
        assert f"{key}`" in page, f"docs/differences.md lacks {path}"
        if section == "optim":
            assert getattr(Config().optim, key) != value
        else:
            name = section.partition(".")[2]
            resolved = Pretrain.resolve(load(f"{name}_base_v1"))
            assert value_at(resolved.modality, f"{name}.{key}") != value
