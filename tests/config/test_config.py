"""Configuration: decoding, overrides, validation, resume rules; what a person reads when wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from d2v_ds import recipes
from d2v_ds.config import Config
from d2v_ds.config.decoding import decode, differences, dump_yaml, to_dict
from d2v_ds.config.engine_file import load_engine_config
from d2v_ds.config.resume import refuse_changes
from d2v_ds.errors import UserError
from d2v_ds.pretrain import Pretrain


def load(*overrides: str) -> Config:
    return recipes.load("speech_tiny", list(overrides))


def test_overrides_are_typed_by_the_setting() -> None:
    config = load("optim.lr=1e-3", "optim.betas=[0.8, 0.9]", "log.progress=false", "run.steps=7e2")
    assert config.optim.lr == 0.001
    assert config.optim.betas == (0.8, 0.9)
    assert config.log.progress is False
    assert config.run.steps == 700


def test_one_shard_set_or_one_for_each_modality() -> None:
    assert load("data.shards=/a").sources == {"speech": "/a"}
    assert load("data.shards.speech=/b").sources == {"speech": "/b"}
    two = load(
        "data.shards={speech/x: /c, speech/y: /d}", "data.weights={speech/x: 1, speech/y: 2}"
    )
    assert list(two.sources) == ["speech/x", "speech/y"] and two.batch_size("speech") == 8.05


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.learning=1", "optim.learning: no such setting"),
        ("optim.lrr=1", "optim.lrr: no such setting; did you mean 'lr'?"),
        ("optimm.lr=1", "optimm: no such setting; did you mean 'optim'?"),
        ("optim.lr=fast", "optim.lr: expected a number, got 'fast'"),
        ("run.steps=1.5", "run.steps: expected a whole number, got 1.5"),
        ("run.steps=true", "run.steps: expected a whole number, got True"),
        ("log.progress=1", "log.progress: expected true or false, got 1"),
        ("optim.schedule=cosin", "optim.schedule: expected one of cosine, tri_stage, constant"),
        ("optim.betas=[0.9]", "optim.betas: expected 2 values, got 1"),
        ("optim.lr=-1", "optim.lr: must be above 0, got -1.0"),
        ("optim.warmup_steps=401", "optim.warmup_steps: 401 does not lie in 0 .. run.steps=400"),
        ("teacher.decay=1.5", "teacher.decay: must lie in [0, 1], got 1.5"),
        ("save.keep_every=150", "save.keep_every: must be 0 (off) or a multiple of save.every=100"),
        ("data.weights.text=1", "data.weights.text: no such source in this run (has: speech)"),
        ("optim.lr.x=1", "optim.lr: is a value, not a section"),
        ("optim.lr", "'optim.lr': expected key.path=value"),
    ],
)
def test_a_wrong_setting_is_named_with_what_is_allowed(override: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load(override)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.deep=3", "model.deep: no such setting; did you mean 'depth'?"),
        ("model.heads=3", "model: dim=128 is not divisible by heads=3"),
        ("modality.speech.mask.pr=1", "modality.speech.mask.pr: no such setting"),
        ("modality.speech.mask.prob=1", "modality.speech.mask: prob=1.0 does not lie between"),
        ("modality.speech.convs=[[1, 2]]", "modality.speech.convs[0]: expected 3 values, got 2"),
        ("modality.speech.shared=[conv]", "modality.speech: shared: no part 'conv'"),
        ("modality.smell={}", "modality.smell: no such modality (allowed: speech, text, vision)"),
        ("target.top_k=9", "target.top_k: 9 exceeds model.depth=4; lower it"),
    ],
)
def test_a_wrong_model_setting_is_named(override: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        Pretrain.create(load(override))
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_a_recipe_resolves_and_its_file_starts_the_same_run(name: str, tmp_path: Path) -> None:
    config = Pretrain.resolve(recipes.load(name, ["data.shards=/somewhere"]))
    path = tmp_path / "config.yaml"
    path.write_text(dump_yaml(config))
    assert Pretrain.resolve(recipes.load(str(path), [])) == config
    assert recipes.summary(name).endswith(".")


def test_an_unknown_recipe_or_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'speech_tin': no such recipe; did you mean 'speech_tiny'"):
        recipes.load("speech_tin", [])
    with pytest.raises(UserError, match=r"none\.yaml: no such file"):
        recipes.load("none.yaml", [])
    bad = tmp_path / "bad.yaml"
    bad.write_text("a: [")
    with pytest.raises(UserError, match=r"bad\.yaml: not valid YAML"):
        recipes.load(str(bad), [])
    bad.write_text("- 1")
    with pytest.raises(UserError, match="expected a mapping of settings"):
        recipes.load(str(bad), [])


def test_yaml_reads_scientific_numbers_as_strings_and_decoding_knows() -> None:
    assert yaml.safe_load("1e-3") == "1e-3"
    assert decode(Config, {"optim": {"lr": "1e-3"}}).optim.lr == 1e-3


def test_differences_are_paths() -> None:
    assert differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}, "d": 4}) == ["a.c", "d"]


def test_resuming_allows_some_changes_and_lists_the_others() -> None:
    old = to_dict(load())
    assert refuse_changes(old, to_dict(load("run.steps=500", "engine.config=zero3"))) == []
    with pytest.raises(UserError) as caught:
        refuse_changes(old, to_dict(load("optim.lr=2e-3", "model.depth=5")))
    message = str(caught.value)
    assert "model.depth was 4, is 5" in message and "optim.lr was 0.001, is 0.002" in message
    assert "--allow model.depth" in message
    changed = to_dict(load("optim.lr=2e-3"))
    assert refuse_changes(old, changed, ("optim.lr",)) == ["optim.lr"]
    assert refuse_changes(old, changed, ("optim",)) == ["optim.lr"]


@pytest.mark.parametrize("key", ["gradient_clipping", "bf16", "train_batch_size", "optimizer"])
def test_a_key_with_two_owners_is_refused(tmp_path: Path, key: str) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}, key: 1}))
    with pytest.raises(UserError, match=f"sets {key}, but the run configuration owns it"):
        load_engine_config(str(path))


def test_engine_config_errors_are_named(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"'zero4' is neither a JSON file nor one of local, .*zero2"
    ):
        load_engine_config("zero4")
    path = tmp_path / "mine.json"
    path.write_text("{")
    with pytest.raises(UserError, match=r"mine\.json: not valid JSON"):
        load_engine_config(str(path))
    assert load_engine_config("local") == {}


def modules_after(code: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}\nprint('\\n'.join(sys.modules))"],
        capture_output=True,
        text=True,
        check=True,
    )
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "code",
    [
        "from d2v_ds import cli; cli.main(['recipes'])",
        "from d2v_ds import cli; assert cli.main(['train', 'speech_tiny', 'a.b=1']) == 2",
        "from d2v_ds import cli; assert cli.main(['train', 'speech_tiny']) == 2",
        "from d2v_ds import cli; assert cli.main(['status', '/nowhere']) == 2",
    ],
)
def test_mistakes_and_listings_import_neither_torch_nor_deepspeed(code: str) -> None:
    modules = modules_after(code)
    assert "torch" not in modules and "deepspeed" not in modules


def test_show_does_not_wait_for_deepspeed() -> None:
    modules = modules_after("from d2v_ds import cli; cli.main(['show', 'speech_tiny'])")
    assert "torch" in modules and "deepspeed" not in modules


def test_settings_and_options_stand_in_any_order(capsys: pytest.CaptureFixture[str]) -> None:
    from d2v_ds.cli import parse

    words: list[Any] = ["train", "speech_tiny", "--nproc", "2", "a=1", "--new", "b.c=2"]
    arguments = parse(words)
    assert arguments.overrides == ["a=1", "b.c=2"] and arguments.nproc == 2 and arguments.new
    with pytest.raises(SystemExit) as exit_:
        parse([*words, "--newer"])
    assert exit_.value.code == 2 and "--newer" in capsys.readouterr().err
