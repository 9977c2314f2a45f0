"""Every number among the settings is finite and has bounds."""

from __future__ import annotations

import typing
from collections.abc import Iterator
from typing import Annotated, Any

import pytest

from d2v_ds import recipes
from d2v_ds.config import Config, reference
from d2v_ds.config.bounds import Bounds
from d2v_ds.config.decoding import apply_overrides, decode
from d2v_ds.errors import UserError
from d2v_ds.pretrain import Pretrain

SETTINGS = [s for part in reference.flatten(reference.find("")) for s in part.settings.values()]
NUMBERS = [s.path for s in SETTINGS if s.type.split()[0] in ("number", "integer")]


def refused(path: str, value: str) -> str:
    """The message for a setting with this value, wherever it is found."""
    recipe = {"speech": "speech_tiny", "vision": "vision_tiny", "text": "text_tiny"}.get(
        path.removeprefix("modality.").partition(".")[0], "speech_tiny"
    )
    with pytest.raises(UserError) as caught:
        Pretrain.resolve(recipes.load(recipe, [f"{path}={value}"]))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "value", [".nan", ".inf", "-.inf", "nan", "-1e300", "1e300", "1e400", "9" * 400, "x", "[[]]"]
)
def test_no_number_accepts_these(value: str) -> None:
    assert len(NUMBERS) > 120
    for path in NUMBERS:
        assert refused(path, value).startswith((path + ":", path + "["))


def test_every_setting_refuses_other_kinds_of_values() -> None:
    for setting in SETTINGS:
        value = "[{x: [1]}]" if "mapping" in setting.type else "{x: {y: 1}}"
        assert refused(setting.path, value).startswith(setting.path), setting


def test_every_number_has_bounds() -> None:
    """decoding.py refuses nothing but infinities without them."""
    kinds = [Config, *(type(value) for value in _sections())]
    without = [
        f"{kind.__name__}.{name}"
        for kind in dict.fromkeys(kinds)
        for name, hint in typing.get_type_hints(kind, include_extras=True).items()
        if hint is not typing.ClassVar and any(one in (int, float) for one in _leaves(hint))
    ]
    assert without == ["VisionConfig.crop_scale"]  # checked as an interval


def _sections() -> Iterator[Any]:
    config = Config()
    for name in ("run", "data", "batch", "target", "teacher", "optim", "finetune", "valid"):
        yield getattr(config, name)
    yield from (config.probe, config.engine, config.log, config.save)
    for kind in _lazy():
        yield kind
        yield from (v for v in vars(kind).values() if hasattr(v, "__dataclass_fields__"))


def _lazy() -> Iterator[Any]:
    from d2v_ds.modalities import REGISTRY, modality_class
    from d2v_ds.transformer import TransformerConfig

    yield TransformerConfig()
    yield from (modality_class(name).Config() for name in REGISTRY)


def _leaves(hint: Any) -> Iterator[Any]:
    """The types within a hint that have no bounds."""
    if typing.get_origin(hint) is Annotated:
        assert isinstance(typing.get_args(hint)[1], Bounds)
        return
    arguments = typing.get_args(hint)
    if not arguments:
        yield hint
    for argument in arguments:
        yield from _leaves(argument)


@pytest.mark.parametrize(
    ("bounds", "inside", "outside"),
    [
        (Bounds(0), (0, 1, 1e12), {-1: "0 or more", 1e13: "at most 1000000000000"}),
        (Bounds(0, zero="off"), (0,), {-1: "0 (off) or more"}),
        (Bounds(0, open_low=True), (1e-9,), {0: "above 0"}),
        (Bounds(1, 8), (1, 8), {0: "at least 1", 9: "at most 8"}),
        (Bounds(0, 1), (0, 1), {-0.1: "in [0, 1]", 1.1: "in [0, 1]"}),
        (Bounds(0, 1, open_low=True, open_high=True), (0.5,), {0: "in (0, 1)", 1: "in (0, 1)"}),
    ],
)
def test_bounds(bounds: Bounds, inside: tuple[float, ...], outside: dict[float, str]) -> None:
    assert all(bounds.allow(value) for value in inside)
    for value, message in outside.items():
        assert not bounds.allow(value) and bounds.describe(value) == message
    assert not bounds.allow(float("nan"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data=x", "data: expected a mapping of settings, got 'x'"),
        ("batch=.nan", "batch: expected a mapping of settings, got nan"),
        (
            "batch.size={1: 2}",
            "batch.size: '{1: 2}' is not valid YAML (line 1, column 2: the key 1",
        ),
        ("modality=null", "modality: expected a mapping, got None"),
        ("modality={speech: 1}", "modality.speech: expected a mapping, got 1"),
        ("compat=fairseq", ""),
        ("optim=fairseq", "optim: expected a mapping of settings, got 'fairseq'"),
        ("run.name=2020-13-45", "run.name: '2020-13-45' is not valid YAML (line 1, column 1: "),
        ("run.name='\\0'", ""),
        ('run.name="\\0"', "run.name: must not contain a NUL character"),
        ("run.steps=!!int a", "run.steps: '!!int a' is not valid YAML"),
        ("run.steps=" + "[" * 3000, "run.steps: '[[["),
        ("run.seed=1e30", "run.seed: must be at most"),
        ("optim.eps=0", "optim.eps: must be above 0, got 0.0"),
        ("log.pictures_every=0", "log.pictures_every: must be at least 1, got 0"),
        ("optim.schedule=[]", "optim.schedule: expected one of cosine"),
        ("batch.size={speech: 0}", "batch.size.speech: must be above 0, got 0.0"),
        ("engine.config=" + "x" * 5000, ""),
    ],
)
def test_hostile_overrides(override: str, message: str) -> None:
    if not message:
        recipes.load("speech_tiny", [override])
        return
    with pytest.raises(UserError) as caught:
        recipes.load("speech_tiny", [override])
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_compat_of_sections_that_are_none() -> None:
    for broken in ("modality=1", "optim=1", "modality.speech=1", "modality={text: 1}"):
        with pytest.raises(UserError):
            recipes.load("speech_tiny", [broken, "compat=fairseq"])


def test_seeds_may_be_negative() -> None:
    assert decode(Config, apply_overrides({}, ["run.seed=-3"])).run.seed == -3
