"""The contract of a modality: what a subclass must define."""

from __future__ import annotations

from typing import Any

import pytest

from d2v_ds.config.decoding import decode
from d2v_ds.errors import UserError
from d2v_ds.modalities.base import REQUIRED, Modality, ModalityConfig
from d2v_ds.modalities.text import Text
from tests.helpers.sensor import Sensor

METHODS = {
    "baseline",
    "check_sample",
    "collate",
    "cost",
    "crop",
    "decode",
    "fit",
    "front_end",
    "largest",
    "masked_tokens",
    "picture",
    "predictor",
    "unmasked",
}


def members_of(kind: type[Modality], *left_out: str) -> dict[str, Any]:
    """All that a modality defines, except some names."""
    return {
        name: vars(kind)[name] for name in [*REQUIRED, *sorted(METHODS)] if name not in left_out
    }


def test_a_subclass_with_everything_is_accepted() -> None:
    kind = type("Whole", (Modality,), members_of(Sensor))
    assert issubclass(kind, Modality) and kind.name == "series"
    assert kind.packed_extensions == {} and kind.converter == "" and kind.baseline_name == ""


@pytest.mark.parametrize("name", [*REQUIRED, *sorted(METHODS)])
def test_a_missing_name_is_an_error_when_the_class_is_defined(name: str) -> None:
    with pytest.raises(TypeError) as caught:
        type("Part", (Modality,), members_of(Sensor, name))
    assert str(caught.value) == f"modality Part lacks {name}"


def test_all_missing_names_are_reported_at_once() -> None:
    with pytest.raises(TypeError) as caught:

        class Empty(Modality):
            pass

    missing = str(caught.value).removeprefix("modality Empty lacks ").split(", ")
    assert set(missing) == {*REQUIRED, *METHODS} and len(missing) == len(set(missing))


def test_an_intermediate_class_may_lack_names_and_its_subclasses_may_not() -> None:
    class Partial(Modality, abstract=True):
        name = "partial"

        def cost(self, length: int) -> float:
            return 1.0

    with pytest.raises(TypeError, match="modality Child lacks batch_unit, length_unit") as caught:
        type("Child", (Partial,), {})
    assert "cost" not in str(caught.value).split(", ") and "name" not in str(caught.value)
    type("Child", (Partial,), members_of(Sensor, "name", "cost"))


def test_a_subclass_of_a_modality_inherits_what_it_needs() -> None:
    class Lines(Text):
        name = "lines"

    assert Lines(Text.Config()).views == 8  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"views": 0}, "m.views: must be at least 1, got 0"),
        ({"loss_beta": -1.0}, "m.loss_beta: must be 0 or more, got -1.0"),
        ({"loss_weight": 0.0}, "m.loss_weight: must be above 0, got 0.0"),
        ({"loss_scale": float("nan")}, "m.loss_scale: must be a finite number, got nan"),
        ({"cls_weight": float("inf")}, "m.cls_weight: must be a finite number, got inf"),
        ({"shared": ["conv"]}, "m: shared: no part 'conv' (allowed: features, positions, context)"),
    ],
)
def test_settings_that_every_modality_checks(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        decode(ModalityConfig, settings, "m")
    assert str(caught.value) == message
