"""The reference of the settings: every setting documented, the command, docs/configuration.md."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any, Literal

import pytest

from d2v_ds.cli import main
from d2v_ds.config import Config
from d2v_ds.config.decoding import apply_overrides, decode
from d2v_ds.config.reference import (
    Section,
    Setting,
    as_markdown,
    as_text,
    docstrings,
    find,
    flatten,
    read,
    read_common,
    type_text,
)
from d2v_ds.config.resume import MAY_CHANGE
from d2v_ds.errors import UserError
from d2v_ds.modalities import REGISTRY, modality_class
from d2v_ds.modalities.base import ModalityConfig
from d2v_ds.transformer import TransformerConfig
from tests import ROOT
from tests.config.helpers import modules_after


def every_setting() -> list[Setting]:
    whole = find("")
    assert isinstance(whole, Section)
    return [setting for section in flatten(whole) for setting in section.settings.values()]


def settings_classes(defaults: Any) -> Iterator[type]:
    """The class of a settings dataclass and those of its sections."""
    yield type(defaults)
    for field in dataclasses.fields(defaults):
        value = getattr(defaults, field.name)
        if dataclasses.is_dataclass(value):
            yield from settings_classes(value)


CLASSES = {
    kind
    for defaults in (
        Config(),
        TransformerConfig(),
        ModalityConfig(),
        *(modality_class(name).Config() for name in REGISTRY),
    )
    for kind in settings_classes(defaults)
}


# ---------------------------------------------------------------------------------- completeness


@pytest.mark.parametrize("kind", sorted(CLASSES, key=lambda kind: (kind.__module__, kind.__name__)))
def test_every_setting_has_a_docstring(kind: type) -> None:
    assert kind.__doc__ and not kind.__doc__.startswith(f"{kind.__name__}("), "the class has none"
    texts = docstrings(kind)
    defaults = kind()
    for field in dataclasses.fields(defaults):
        if isinstance(defaults, Config) and field.name in ("model", "modality"):
            continue  # sections, which have their own classes
        if not dataclasses.is_dataclass(getattr(defaults, field.name)):
            assert texts.get(field.name, "").endswith("."), field.name


def test_a_setting_has_one_description() -> None:
    """Applies to settings with the same path in several modalities, and to subclasses."""
    described: dict[tuple[str, str], set[str]] = {}
    for setting in every_setting():
        path = re.sub(r"^modality\.\w+\.", "modality.NAME.", setting.path)
        if not path.endswith("mask.kind"):  # the kinds of masks have one name in two modalities
            described.setdefault((path, setting.type), set()).add(setting.text)
    assert [path for path, texts in described.items() if len(texts) > 1] == []
    both = [find(f"modality.speech.{part}.zero_last") for part in ("decoder", "head")]
    assert len({setting.text for setting in both}) == 1


def test_every_setting_is_listed_with_its_default() -> None:
    settings = every_setting()
    paths = [setting.path for setting in settings]
    assert len(paths) == len(set(paths))
    assert {"compat", "optim.lr", "model.dim", "modality.vision.mask.patches"} <= set(paths)
    assert {field.name for kind in CLASSES for field in dataclasses.fields(kind)} == {
        name for path in paths for name in path.split(".") if name not in REGISTRY
    }
    # As overrides, the defaults change nothing.
    common = [s for s in settings if s.path.partition(".")[0] not in ("model", "modality")]
    raw = apply_overrides({}, [f"{s.path}={s.default}" for s in common])
    assert decode(Config, raw) == Config()
    for name, kind in (("speech", modality_class("speech").Config), ("model", TransformerConfig)):
        start = name if name == "model" else f"modality.{name}"
        own = [s for s in settings if s.path.startswith(f"{start}.")]
        words = [f"{s.path.removeprefix(start + '.')}={s.default}" for s in own]
        assert decode(kind, apply_overrides({}, words)) == kind()


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (int, "integer"),
        (float | None, "number or null"),
        (Literal["a", "b", "c"], "a, b or c"),
        (tuple[float, float], "list of 2 numbers"),
        (tuple[tuple[int, int, int], ...], "list of lists of 3 integers"),
        (str | dict[str, str], "string or mapping of names to strings"),
    ],
)
def test_types_in_words(kind: Any, text: str) -> None:
    assert type_text(kind) == text


@dataclasses.dataclass(frozen=True)
class Base:
    """A section."""

    one: int = 1
    """One,
    in two lines."""
    two: str = ""
    """Two."""


@dataclasses.dataclass(frozen=True)
class Derived(Base):
    two: str = "2"
    three: float = 3.0
    """Three."""


def test_a_subclass_inherits_descriptions_and_changes_defaults() -> None:
    section = read(Derived(), "x")
    assert [(s.path, s.default, s.text) for s in section.settings.values()] == [
        ("x.one", "1", "One, in two lines."),
        ("x.two", "2", "Two."),
        ("x.three", "3.0", "Three."),
    ]
    assert read(Base(), "").settings["two"].default == '""'


# ----------------------------------------------------------------------------------- the command


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["settings", *words]) == 0
    return capsys.readouterr().out


def test_one_setting(capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(capsys, "optim.lr") == (
        "optim.lr (number; default 0.0005)\n    The peak learning rate.\n"
    )
    text = printed(capsys, "optim.schedule")
    assert text.startswith("optim.schedule (cosine, tri_stage, constant, linear or cosine_beit; de")
    assert printed(capsys, "batch.size.speech") == printed(capsys, "batch.size")
    assert "null" in printed(capsys, "modality.vision.cls_views").splitlines()[0]


def test_a_section_and_nested_ones(capsys: pytest.CaptureFixture[str]) -> None:
    def headings(*words: str) -> list[str]:
        text = printed(capsys, *words)
        assert max(map(len, text.splitlines())) <= 100
        return re.findall(r"^(\S+) \(", text, re.M)

    assert headings("teacher") == ["teacher.decay", "teacher.decay_end", "teacher.anneal_steps"]
    mask = ["kind", "prob", "length", "adjust", "inverse"]
    assert headings("modality.speech.mask") == [f"modality.speech.mask.{name}" for name in mask]
    speech = headings("modality.speech")
    assert {"modality.speech.views", "modality.speech.mask.kind"} <= set(speech)
    assert headings() == [setting.path for setting in every_setting()]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("optimm", "optimm: no such setting; did you mean 'optim'?"),
        ("optim.lrr", "optim.lrr: no such setting; did you mean 'lr'?"),
        ("optim.lr.x", "optim.lr: is a value, not a section"),
        ("optim.", "optim.: no such setting (allowed: adam_eps, betas"),
        ("model.widht", "model.widht: no such setting (allowed:"),
        ("modality.sound", "modality.sound: no such setting (allowed: speech, text, vision)"),
        ("modality.speech.mask.prop", "modality.speech.mask.prop: no such setting; did you mean"),
    ],
)
def test_an_unknown_path_is_an_error_with_a_suggestion(
    path: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError) as caught:
        find(path)
    assert str(caught.value).startswith(message)
    assert main(["settings", path]) == 2
    assert capsys.readouterr().err.startswith(f"d2v-ds: {message}")


def test_a_modality_from_outside_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(REGISTRY, "series", "tests.helpers.sensor:Sensor")
    text = as_text("modality.series")
    assert "modality.series.crop (integer; default 200)\n    Longer series are cropped" in text
    assert "modality.series.views (integer; default 2)\n    Masked views per sample" in text


def test_only_model_and_modality_import_torch() -> None:
    code = "from d2v_ds import cli; assert cli.main(['settings', '{}']) == 0"
    assert "torch" not in modules_after(code.format("optim"))
    assert "torch" not in modules_after(code.format("data.shards"))
    assert "torch" in modules_after(code.format("model.dim"))


# ------------------------------------------------------------------------- docs/configuration.md


def test_the_page_is_the_generated_one(capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "configuration.md").read_text()
    assert page == as_markdown(), "run `d2v-ds settings --markdown > docs/configuration.md`"
    assert printed(capsys, "--markdown") == page


def test_the_page_has_every_setting_once() -> None:
    page = as_markdown()
    rows = re.findall(r"^\| `([\w.]+)` \|", page.split("\n## The whole run\n")[1], re.M)
    assert len(rows) == len(set(rows))
    common = {s.path for section in flatten(read_common()) for s in section.settings.values()}
    assert common <= set(rows)
    for setting in every_setting():
        shared = re.sub(r"^modality\.\w+\.", "modality.NAME.", setting.path)
        assert setting.path in rows or shared in common, setting.path
    assert all(f"`{path}" in page for path in MAY_CHANGE)
