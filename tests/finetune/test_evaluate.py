"""Scores of fine-tuned models: the same as those of the validation, and of the loaded model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from d2v_ds import evaluate, load_finetuned
from d2v_ds.cli import main
from d2v_ds.errors import UserError
from tests.finetune.tuning import Tuning

KINDS = {"speech": "wer", "vision": "accuracy", "text": "accuracy"}
SOURCE = {"speech": "spoken", "vision": "vision", "text": "text"}


@pytest.mark.parametrize("modality", KINDS)
def test_scores_equal_those_of_the_validation(
    tuned: dict[str, Tuning], sets: dict[str, Path], modality: str
) -> None:
    run, kind = tuned[modality], KINDS[modality]
    words = ["evaluate", kind, str(run.folder.root), "--test", str(sets[SOURCE[modality]])]
    done = subprocess.run(
        [sys.executable, "-m", "d2v_ds", *words], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    [scores] = summary["scores"].values()
    expected = run.rows()[3]
    for name, value in scores.items():
        assert value == pytest.approx(expected[f"valid_{name}"], abs=1e-9), name
    [(low, high)] = summary["interval"].values()
    assert low <= scores[summary["metric"]] <= high
    assert "evaluations.jsonl" in summary["recorded"]
    line = json.loads((run.folder.root / "evaluations.jsonl").read_text().splitlines()[-1])
    assert line["scores"] == summary["scores"] and line["arguments"]["probe"] == kind
    assert f"fine-tuned model at step 4, {summary['metric']}" in done.stdout


def test_a_run_a_checkpoint_and_the_link_to_the_best_load(tuned: dict[str, Tuning]) -> None:
    run = tuned["vision"].folder
    newest, older = load_finetuned(run.root), load_finetuned(run.checkpoint(2))
    assert newest.step == 4 and older.step == 2
    images = [np.full((3, 16, 16), i, dtype=np.uint8) for i in (0, 90)]
    with torch.no_grad():
        a, b = newest(images).values, older(images).values
        assert a.shape == (2, 4) and not torch.equal(a, b)
        assert torch.equal(a, load_finetuned(run.checkpoint(4))(images).values)
    pixels = np.full((16, 16, 3), 90, dtype=np.uint8)  # height, width, channels
    assert np.array_equal(newest.prepare(pixels), images[1])
    with pytest.raises(UserError, match=r"example 1 .*; `prepare` makes examples"):
        newest([images[0], pixels[:8]])
    best = load_finetuned(run.checkpoints / "best")
    assert best.step in (2, 4) and best.predict(images)[0] in best.labels.names


@pytest.mark.parametrize("modality", ["speech", "text"])
def test_padding_does_not_influence_logits(tuned: dict[str, Tuning], modality: str) -> None:
    model = load_finetuned(tuned[modality].folder.root)
    rng = np.random.default_rng(0)
    examples: list[Any] = [rng.integers(4, 60, n) for n in (20, 31, 7)]
    if modality == "speech":
        examples = [rng.standard_normal(n).astype(np.float32) for n in (4000, 9000, 6100)]
    with torch.no_grad():
        values, lengths = model(examples)
        for row, length, example in zip(values, lengths.tolist(), examples, strict=True):
            alone = model([example]).values[0]
            row = row[:length] if modality == "speech" else row
            torch.testing.assert_close(row, alone, rtol=1e-4, atol=1e-5)
    singles = [model.predict([example])[0] for example in examples]
    assert model.predict(examples) == singles


def test_other_models_and_options_are_refused(
    tuned: dict[str, Tuning], pretrained: Path, sets: dict[str, Path]
) -> None:
    run, spoken = tuned["speech"].folder.root, [str(sets["spoken"])]
    with pytest.raises(UserError, match="is fine-tuned for ctc; use `d2v-ds evaluate wer`, not"):
        evaluate.run_finetuned(run, kind="accuracy", tests=spoken)
    with pytest.raises(UserError, match="is a pre-trained encoder without a head; fine-tune it"):
        evaluate.run_finetuned(pretrained, kind="wer", tests=spoken)
    with pytest.raises(UserError, match=r"sample 'image0002': finetune\.label: its label 'x' is"):
        from tests.helpers import joint_sets

        other = joint_sets.write_images(
            run.parent / "other", 4, label=lambda corner: f"corner {corner}" if corner < 2 else "x"
        )
        evaluate.run_finetuned(tuned["vision"].folder.root, kind="accuracy", tests=[str(other)])
    with pytest.raises(UserError, match=r"its \.json has no 'words'"):
        evaluate.run_finetuned(run, kind="wer", tests=spoken, label="words")
    for words, message in (
        (["wer", str(run), "--layer", "2"], "--layer: is not an option of `evaluate wer`"),
        (
            ["wer", str(run), "--modality", "vision"],
            "--modality: is not an option of `evaluate wer`",
        ),
        (["wer", str(run), "--lm-weight", "3"], "--lm-weight: has no effect without a language mo"),
        (["accuracy", str(run), "--word-score", "1"], "--word-score: is not an option of `evalu"),
        (["knn", str(run), "--layer", "x"], "expected an integer of at least 1, or all"),
        (
            ["knn", str(run), "--train", str(spoken[0]), "--compare"],
            "is fine-tuned, so its encoder",
        ),
        (["knn", str(run)], "--train: must be given for `evaluate knn`"),
        (["knn", str(run), "--train", "x", "--beam", "3"], "--beam: is not an option of `evalu"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "d2v_ds", "evaluate", *words, "--test", *spoken],
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 2 and message in done.stderr


def test_a_test_set_that_is_given_twice(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "accuracy", "runs/x", "--test", "a", "b", "a"]) == 2
    assert capsys.readouterr().err == "d2v-ds: --test: a is given twice\n"


def test_probes_read_the_encoder_of_a_fine_tuned_run(
    tuned: dict[str, Tuning], sets: dict[str, Path]
) -> None:
    images = str(sets["vision"])
    _, summary = evaluate.run_knn(tuned["vision"].folder.root, gallery=images, tests=[images])
    assert summary["accuracy"]["trained student"][images] > 0.25
    with pytest.raises(UserError, match="has no teacher's weights; use the student's"):
        evaluate.run_knn(
            tuned["vision"].folder.root, gallery=images, tests=[images], weights="teacher"
        )
