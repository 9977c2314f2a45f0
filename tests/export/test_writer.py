"""What an export contains, which one is refused, and that nothing is lost on the way."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from d2v_ds.cli import main
from d2v_ds.errors import UserError
from d2v_ds.export import card
from d2v_ds.weights import Weights, open_weights
from shards.cli import main as shards_main
from tests import ROOT
from tests.export.helpers import TOKENIZER, joint_weights, weights_of, with_head, write
from tests.helpers.runs import Run
from tests.helpers.variants import RECIPES, VARIANTS

TEXT_SETTINGS = ["modality.text.vocab_size=4096", "modality.text.mask_id=4095"]


def exact(found: Weights, folder: Path, which: Any) -> Weights:
    """Asserts that the folder, opened again, has the same settings and tensors; returns it."""
    again = open_weights(folder)
    for ours, theirs in ((found.model, again.model), (found.modality, again.modality)):
        assert json.loads(json.dumps(ours)) == json.loads(json.dumps(theirs))
    assert again.step == found.step
    same(found.encoder(which), again.encoder(which))
    same(found.tensors("head"), again.tensors("head"))
    same(*(predictors(each) for each in (found, again)))
    return again


def predictors(found: Weights) -> dict[str, Tensor]:
    student = found.tensors("student").items()
    return {name: value for name, value in student if name.startswith("predictors.")}


def same(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_all_tensors_and_settings_are_kept(variant: str, tmp_path: Path) -> None:
    for which in ("student", "teacher"):
        found = weights_of(variant)
        write(found, tmp_path / which, weights=which)
        exact(found, tmp_path / which, which)
        entry = json.loads((tmp_path / which / "config.json").read_text())["d2v_ds"]
        assert entry["version"] == 1 and entry["weights"] == which and entry["step"] == 7
        plain = json.loads(json.dumps({"model": found.model, "modality": found.modality}))
        assert {key: entry[key] for key in plain} == plain
        assert entry["about"]["recipe"] == found.about["recipe"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_fine_tuned_models_are_kept(variant: str, tmp_path: Path) -> None:
    found = with_head(weights_of(variant))
    write(found, tmp_path / "out")
    again = exact(found, tmp_path / "out", "student")
    assert json.dumps(again.finetune) == json.dumps(found.finetune)


def test_one_modality_of_a_joint_model(tmp_path: Path) -> None:
    found = joint_weights()
    write(found, tmp_path / "out", modality="speech")
    again = open_weights(tmp_path / "out")
    assert again.modality == {"speech": again.modality["speech"]}
    expected = {k: v for k, v in found.encoder().items() if "vision" not in k and ".text." not in k}
    same(expected, again.encoder())
    assert all(name.startswith("predictors.speech.") for name in predictors(again))
    with pytest.raises(UserError, match="no 'smell' in this run"):
        write(found, tmp_path / "other", modality="smell")
    assert not (tmp_path / "other").exists()


def test_existing_folders_are_refused_unless_empty(tmp_path: Path) -> None:
    found = weights_of("v1_vision")
    (tmp_path / "out").mkdir()
    write(found, tmp_path / "out")
    before = (tmp_path / "out/model.safetensors").stat().st_mtime_ns
    with pytest.raises(UserError, match="already exists; choose another folder or remove it"):
        write(found, tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").stat().st_mtime_ns == before
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="already exists"):
        write(found, tmp_path / "file")
    write(found, tmp_path / "deep/below/out")


def test_the_model_card(tmp_path: Path) -> None:
    found = with_head(weights_of("v1_speech"))
    write(found, tmp_path / "out", license="cc-by-4.0")
    text = (tmp_path / "out/README.md").read_text()
    for part in (
        "license: cc-by-4.0",
        "pipeline_tag: automatic-speech-recognition",
        "AutoModelForCTC.from_pretrained(folder)",
        "| steps | 7 |",
        f"| recipe | {found.about['recipe']} |",
        "| outputs | 5 |",
        "a padded batch differs from single recordings",
    ):
        assert part in text, part
    write(joint_weights(), tmp_path / "joint")
    text = (tmp_path / "joint/README.md").read_text()
    assert card.FILL_IN in text and "license: other" in text
    assert 'load_encoder(".", modality="speech")' in text
    assert "AutoModel.from_pretrained(folder, trust_remote_code=True)" in text


# ----------------------------------------------------------------------- a run, from shards to use


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two steps on real text."""
    root = tmp_path_factory.mktemp("run")
    corpus = ROOT / "shards/samples/text/unseen.jsonl"
    tokenizer = str(ROOT / TOKENIZER)
    words = ["text", str(corpus), str(root / "set"), "--tokenizer", tokenizer, "--block", "40"]
    assert shards_main(words) == 0
    recipe, settings = RECIPES["v1_text"]
    run = Run(
        root / "run",
        recipe,
        "model.dim=32",
        "model.depth=2",
        "target.top_k=2",
        "engine.config=local",
        *settings,
        *TEXT_SETTINGS,
        f"data.shards={root / 'set'}",
        "batch.size=400",
        "run.steps=2",
        "optim.warmup_steps=1",
        "log.every=1",
        "save.every=2",
    )
    done = run.train(nproc=1)
    assert done.returncode == 0, done.stdout + done.stderr
    return run


def test_a_run_keeps_its_tokenizer(run: Run) -> None:
    content = (ROOT / TOKENIZER).read_bytes()
    assert run.folder.tokenizer.read_bytes() == content
    for path in (run.folder.root, run.folder.checkpoint(2)):
        assert open_weights(path).files["tokenizer.model"].read_bytes() == content


def test_export_of_a_run(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command verifies, and the program of the model card runs in the folder."""
    out = tmp_path / "out"
    assert main(["export", str(run.folder.root), str(out), "--license", "mit"]) == 0
    printed = capsys.readouterr().out
    assert "Data2VecTextModel\nverified with transformers" in printed
    assert re.search(r"text: features \d\.\de-0\d", printed)
    exact(open_weights(run.folder.root), out, "student")
    about = json.loads((out / "config.json").read_text())["d2v_ds"]["about"]
    assert about["data"]["text"]["set"] == "set" and about["data"]["text"]["samples"] > 100
    assert about["metrics"]["step"] == 2 and about["seen"]["samples"] > 0
    text = (out / "README.md").read_text()
    assert str(run.folder.root) not in text + (out / "config.json").read_text()
    assert "| data, text | set: " in text and "| loss" in text
    programs = re.findall(r"```python\n(.*?)```", text, re.S)
    first = "from d2v_ds.data.audio import import_torchaudio\nimport_torchaudio()\n" + programs[0]
    done = subprocess.run([sys.executable, "-c", first], cwd=out, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("torch.Size([2, ")


def test_metrics_are_of_the_newest_step_whatever_was_evaluated_last(tmp_path: Path) -> None:
    rows = [{"step": 6, "loss": 1.0}, {"step": 3, "evaluation": "knn"}, {"step": 9, "loss": 0.5}]
    text = "".join(f"{json.dumps(row)}\n" for row in rows)
    (tmp_path / "metrics.jsonl").write_text(text)
    assert card.last_metrics(tmp_path, 6) == {"step": 6, "loss": 1.0}


def test_import_writes_the_same(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(run.folder.checkpoint(2)), str(tmp_path / "out"), "--weights", "teacher"]
    assert main(["import", *words, "--no-verify"]) == 0
    assert "not verified" in capsys.readouterr().out
    exact(open_weights(run.folder.root), tmp_path / "out", "teacher")


def test_command_line_errors(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, out = str(run.folder.root), str(tmp_path / "out")

    def error(*words: str) -> str:
        assert main(["export", *words]) == 2
        [line] = capsys.readouterr().err.splitlines()
        return line

    assert "no such file or folder" in error(str(tmp_path / "none"), out)
    assert "already exists" in error(root, root)
    assert "no 'speech' in this run" in error(root, out, "--modality", "speech")
    assert "none.model: no such file" in error(root, out, "--tokenizer", "none.model")
    (tmp_path / "bad.model").write_text("x")
    assert "is not a sentencepiece" in error(root, out, "--tokenizer", str(tmp_path / "bad.model"))
    kept = run.folder.tokenizer.rename(tmp_path / "kept.model")
    try:
        assert "has no tokenizer.model or tokenizer.json; give" in error(root, out)
        assert main(["import", root, out, "--no-verify"]) == 0
        assert "no tokenizer was found" in capsys.readouterr().out
    finally:
        kept.rename(run.folder.tokenizer)
