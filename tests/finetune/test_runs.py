"""Fine-tuning runs, started the way users start them: each kind of task learns, what is frozen
stays, and a killed run resumes bit-identically."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from d2v_ds.finetune.model import load_finetuned
from d2v_ds.weights import open_weights
from tests.finetune.tuning import QUICK, Tuning, tuning
from tests.helpers import joint_sets
from tests.helpers.runs import assert_equal_runs, environment


def test_images_are_learnt(sets: Any, pretrained: Path, tmp_path: Path) -> None:
    """A square in the upper or in the lower half: a class that flips do not change."""

    def half(corner: int) -> str:
        return "upper" if corner < 2 else "lower"

    train, held_out = (
        joint_sets.write_images(tmp_path / str(seed), 40, seed, half) for seed in (0, 1)
    )
    run = tuning(tmp_path / "run", "vision", sets, pretrained, "engine.config=local")
    more = [f"data.shards={train}", f"data.valid={held_out}", "run.steps=60", "valid.every=30"]
    more += ["modality.vision.crop_scale=[0.9, 1]", "save.every=30", "optim.lr=1e-2"]
    done = run.tune(*more, "finetune.layer_decay=1", "model.drop_path=0", "finetune.mixup=0.1")
    row = run.rows()[-1]
    assert row["valid_accuracy"] > 0.9, row
    assert "parameters are in init but not in this model, so not used: " in done.stdout
    assert "init: 4 parameters are new, with random values: head.norm.*, head.proj.*" in done.stdout
    config = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert config["finetune"]["labels"] == ["lower", "upper"]
    assert config["model"]["dim"] == 32  # of init
    found = open_weights(tmp_path / "run")
    assert found.finetune["task"] == "classification" and found.step == 60
    assert set(found.tensors("head")) == {
        f"head.{layer}.{name}" for layer in ("norm", "proj") for name in ("weight", "bias")
    }


def test_transcripts_are_learnt_by_heart(sets: Any, pretrained: Path, tmp_path: Path) -> None:
    run = tuning(tmp_path, "speech", sets, pretrained, "engine.config=local")
    more = ["run.steps=12", f"data.valid={sets['spoken']}", "valid.every=6", "save.every=6"]
    run.tune(*more, "finetune.freeze_steps=3", "optim.decay_steps=3")
    losses = run.losses()
    assert losses[12] < 0.5 * losses[1]
    row = run.rows()[-1]
    assert row["valid_loss"] > 0 and 0 < row["valid_cer"] <= 1 and row["impossible"] == 0
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert config["finetune"]["labels"][:3] == ["<blank>", "|", "e"]
    state = open_weights(tmp_path).tensors("head")
    assert state["head.proj.weight"].shape == (len(config["finetune"]["labels"]), 32)


def test_texts_are_learnt(sets: Any, pretrained: Path, tmp_path: Path) -> None:
    run = tuning(tmp_path, "text", sets, pretrained, "engine.config=local", "optim.lr=1e-2")
    more = ["run.steps=20", f"data.valid={sets['text']}", "valid.every=20", "save.every=20"]
    more += ["model.dropout=0", "model.attention_dropout=0"]
    done = run.tune(*more, "finetune.metric=matthews", "modality.text.dropout=0")
    lines = re.findall(
        r"(an epoch|validation every).*; (\d+) of 40 samples are longer than 40 tokens and cut",
        done.stdout,
    )
    assert [line for line, _ in lines] == ["an epoch", "validation every"]
    assert 0 < int(lines[0][1]) < 40 and lines[0][1] == lines[1][1]
    row = run.rows()[-1]
    assert row["valid_accuracy"] == 1.0 and row["valid_matthews"] == 1.0


FREEZE = ["finetune.freeze=front_end", "finetune.freeze_blocks=1", "finetune.freeze_steps=2"]


@pytest.mark.parametrize(
    ("engine", "nproc"),
    [
        ("local", 1),
        pytest.param("zero1", 2, marks=pytest.mark.slow),
        pytest.param("zero2", 2, marks=pytest.mark.slow),
        ("zero3", 2),
    ],
)
def test_what_is_frozen_stays_under_every_stage(
    sets: Any, pretrained: Path, tmp_path: Path, engine: str, nproc: int
) -> None:
    """For two steps only the head moves; then the second block moves, too. All engines agree."""
    run = tuning(tmp_path / "run", "vision", sets, pretrained, f"engine.config={engine}")
    before = open_weights(pretrained).encoder()
    run.tune("run.steps=2", *FREEZE, "save.every=2", nproc=nproc)
    found = open_weights(tmp_path / "run").encoder()
    assert all(torch.equal(found[name], before[name]) for name in found)
    run.tune("run.steps=4", *FREEZE, "save.every=2", nproc=nproc)
    found = open_weights(tmp_path / "run").encoder()
    moved = {name for name in found if not torch.equal(found[name], before[name])}
    assert moved and all(name.startswith("trunk.blocks.1.") for name in moved)
    plain = tuning(tmp_path / "plain", "vision", sets, pretrained, "engine.config=local")
    if engine != "local":
        plain.tune("run.steps=4", *FREEZE)
        assert run.losses() == pytest.approx(plain.losses(), rel=1e-4)


def test_a_resumed_run_is_bit_identical_and_needs_no_init(
    sets: Any, pretrained: Path, tmp_path: Path
) -> None:
    more = ["engine.config=local", f"data.valid={sets['vision']}", "valid.every=2"]
    more += ["save.every=2", "save.keep=2"]
    whole = tuning(tmp_path / "whole", "vision", sets, pretrained, *more)
    whole.tune("run.steps=4", "finetune.freeze_steps=1")
    copy = tmp_path / "copy"
    shutil.copytree(pretrained, copy)
    parts = tuning(tmp_path / "parts", "vision", sets, copy, *more)
    parts.tune("run.steps=4", "finetune.freeze_steps=1")
    (tmp_path / "parts/checkpoints/00000004").rename(tmp_path / "later")
    copy.rename(tmp_path / "moved")
    done = parts.tune("run.steps=4", "finetune.freeze_steps=1")
    assert "resuming at step 2" in done.stdout
    assert_equal_runs(parts, whole)


def test_layer_wise_rates_reach_the_optimizer(sets: Any, pretrained: Path, tmp_path: Path) -> None:
    """With a decay that is nearly zero only the head and, less, the last block move."""
    run = tuning(tmp_path, "vision", sets, pretrained, "engine.config=local")
    more = ["finetune.layer_decay=1e-6", "finetune.layer_decay_front_end=true", "save.every=2"]
    run.tune("run.steps=2", *more, "optim.weight_decay=0")
    before, after = open_weights(pretrained).encoder(), open_weights(tmp_path).encoder()
    moved = {n: float((after[n] - before[n]).abs().max()) for n in after}
    largest = max(moved.values())
    assert 0 < largest < 1e-7
    blocks = [max(v for n, v in moved.items() if f"blocks.{i}." in n) for i in range(2)]
    assert blocks[0] < 1e-3 * blocks[1]


def test_from_scratch_takes_only_the_settings(sets: Any, pretrained: Path, tmp_path: Path) -> None:
    run = tuning(tmp_path, "vision", sets, pretrained, "engine.config=local", "init_from=nothing")
    done = run.tune("run.steps=1", "save.every=1", "optim.warmup_steps=1", "optim.lr=1e-12")
    assert "init: only the settings of the model" in done.stdout
    before, after = open_weights(pretrained).encoder(), open_weights(tmp_path).encoder()
    weight = "trunk.blocks.0.ffn.fc1.weight"
    assert after[weight].shape == before[weight].shape
    assert not torch.allclose(after[weight], before[weight], atol=1e-3)


def test_a_head_continues_only_with_the_same_labels(
    tuned: dict[str, Tuning], sets: Any, tmp_path: Path
) -> None:
    init = tuned["text"].folder.root
    run = tuning(tmp_path / "run", "text", sets, init, "engine.config=local", "optim.lr=1e-12")
    done = run.tune("run.steps=2", "save.every=2")
    assert "parameters are new" not in done.stdout
    before, after = (
        open_weights(init).tensors("head"),
        open_weights(run.folder.root).tensors("head"),
    )
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, atol=1e-9, rtol=1e-6)
    swapped = tuning(tmp_path / "swapped", "text", sets, init, "finetune.labels=[low, high]")
    refused = swapped.train("run.steps=2", "engine.config=local", nproc=1)
    assert refused.returncode == 2
    assert "its head has other labels (high, low ...) than this run (low, high" in refused.stderr
    assert swapped.tune("run.steps=2", "engine.config=local", "init_skip=[head.*]")


def test_sentencepiece_units_stay_with_the_run(sets: Any, pretrained: Path, tmp_path: Path) -> None:
    """The model is copied into the run folder, so that the run can be evaluated without it."""
    text = tmp_path / "text.txt"
    text.write_text("zero one two three four five six seven eight nine\n" * 3)
    model = tmp_path / "units.model"
    assert joint_sets.shards_main(["tokenizer", str(text), str(model), "--vocab-size", "280"]) == 0
    run = tuning(tmp_path / "run", "speech", sets, pretrained, "engine.config=local")
    more = ["run.steps=2", "save.every=2", "optim.decay_steps=1", f"finetune.tokenizer={model}"]
    run.tune(*more, f"data.valid={sets['spoken']}", "valid.every=2")
    model.rename(tmp_path / "elsewhere")
    loaded = load_finetuned(run.folder.root)
    assert loaded.labels.names[0] == "<blank>" and len(loaded.labels.names) == 280
    ids = loaded.labels.encode("two nine")
    assert loaded.labels.decode(ids.tolist()) == "two nine"


@pytest.mark.parametrize(
    ("command", "recipe", "settings", "message"),
    [
        ("train", "finetune_vision_tiny", [], "is a configuration of fine-tuning; use `d2v-ds fi"),
        ("finetune", "vision_tiny", [], "is a configuration of pre-training; use `d2v-ds train`"),
        ("finetune", "finetune_vision_tiny", ["init={pre}/logs"], "neither a checkpoint nor a run"),
        (
            "finetune",
            "finetune_vision_tiny",
            ["init={pre}", "finetune.label=colour"],
            "its .json has no 'colour' (it has: label); convert with that column",
        ),
        (
            "finetune",
            "finetune_vision_tiny",
            ["init={pre}", "finetune.labels=[corner 0, corner 1]"],
            "its label 'corner 2' is not among the 2 classes",
        ),
        (
            "finetune",
            "finetune_speech_tiny",
            ["init={pre}", "data.shards={spoken}", "finetune.labels=[<blank>, '|', a, b]"],
            "not among the 4 symbols",
        ),
        (
            "finetune",
            "finetune_speech_tiny",
            ["init={pre}", "data.shards={spoken}", "finetune.labels=['|', a, b]"],
            "finetune.labels: the first label of CTC is the blank, got '|'",
        ),
        (
            "finetune",
            "finetune_vision_tiny",
            ["init={pre}", "finetune.labels=[corner 0, corner 1, corner 0]"],
            "finetune.labels: 'corner 0' is given twice",
        ),
        ("finetune", "finetune_vision_tiny", ["--check"], "init: must be given: fine-tuning takes"),
        (
            "finetune",
            "finetune_vision_tiny",
            ["init={pre}", "model.dim=64"],
            "init: {pre}: shapes differ: encoder.",
        ),
        (
            "finetune",
            "finetune_vision_tiny",
            ["init={pre}", "finetune.task=ctc"],
            "finetune.task: ctc is not possible with modality vision (allowed: classification)",
        ),
        (
            "finetune",
            "finetune_speech_tiny",
            ["init={pre}", "data.shards={spoken}", "finetune.time_mask_with=token"],
            "finetune.time_mask_with: this encoder has no mask token; use noise or zero",
        ),
        (
            "finetune",
            "finetune_speech_tiny",
            ["init={pre}", "data.shards={silent}"],
            "{silent}: all transcripts are empty, so there is nothing to learn",
        ),
        (
            "finetune",
            "finetune_speech_tiny",
            ["init={pre}", "data.shards={silent}", "finetune.task=classification"],
            "{silent}: all labels are '', so there is nothing to learn",
        ),
        (
            "finetune",
            "finetune_speech_tiny",
            ["init={pre}", "data.shards={spoken}", "finetune.tokenizer=/no.model"],
            "finetune.tokenizer: /no.model: cannot be read as a sentencepiece model",
        ),
    ],
)
def test_bad_input_is_one_line(
    sets: dict[str, Path],
    pretrained: Path,
    tmp_path: Path,
    command: str,
    recipe: str,
    settings: list[str],
    message: str,
) -> None:
    names = {"pre": pretrained, **sets}
    words = [f"run.dir={tmp_path / 'run'}", f"data.shards={sets['vision']}", *QUICK]
    words += ["engine.config=local", "run.steps=3", *(word.format(**names) for word in settings)]
    words += ["optim.decay_steps=1"] * ("speech" in recipe)
    done = subprocess.run(
        [sys.executable, "-m", "d2v_ds", command, recipe, *words, "--nproc", "1"],
        capture_output=True,
        text=True,
        timeout=240,
        env=environment(),
    )
    assert done.returncode == 2 and message.format(**names) in done.stderr, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
