"""Validation while training: the same value on any number of ranks and after a resume, overfitting
is visible, the best checkpoints are kept, and a run that no longer improves ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from d2v_ds.best import Judge
from d2v_ds.checkpoint import open_checkpoint
from d2v_ds.errors import UserError
from d2v_ds.validation import chosen
from tests.helpers import joint_sets
from tests.helpers.runs import Run

SPEECH = [
    *(word for word in joint_sets.SMALL if "speech" in word or "model." in word or "top_k" in word),
    "batch.size=3.2",
    "optim.warmup_steps=1",
    "log.every=1",
]
SPEECH = [word for word in SPEECH if not word.startswith("batch.size={")]


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return joint_sets.write_all(tmp_path_factory.mktemp("sets"))


def validated(run: Run) -> dict[int, float]:
    """{step: valid_loss}."""
    return {row["step"]: row["valid_loss"] for row in run.rows() if "valid_loss" in row}


def losses(run: Run) -> dict[int, float]:
    """{step: training loss}."""
    return {row["step"]: row["loss"] for row in run.rows()}


def train(root: Path, sets: Any, *settings: str, nproc: int, recipe: str = "speech_tiny") -> Run:
    run = Run(
        root,
        recipe,
        *SPEECH,
        f"data.shards={sets['speech']}",
        f"data.valid={sets['speech']}",
        "valid.every=2",
        "save.every=2",
    )
    done = run.train(*settings, nproc=nproc)
    assert done.returncode == 0, done.stderr
    return run


@pytest.fixture(scope="module")
def alone(sets: Any, tmp_path_factory: pytest.TempPathFactory) -> Run:
    root = tmp_path_factory.mktemp("alone") / "run"
    return train(root, sets, "run.steps=6", "engine.config=local", nproc=1)


@pytest.mark.parametrize(
    ("ranks", "engine"), [(2, "zero2"), pytest.param(4, "zero3", marks=pytest.mark.slow)]
)
def test_the_value_does_not_depend_on_ranks_and_stage(
    alone: Run, sets: Any, tmp_path: Path, ranks: int, engine: str
) -> None:
    found = train(tmp_path, sets, "run.steps=6", f"engine.config={engine}", nproc=ranks)
    assert list(validated(found)) == [2, 4, 6]
    assert validated(found) == pytest.approx(validated(alone), rel=1e-6)


def test_it_is_the_same_after_a_resume_and_changes_nothing(
    alone: Run, sets: Any, tmp_path: Path
) -> None:
    """Training is bit-identical to that of a run without validation."""
    settings = ["engine.config=local", "data.workers=0"]
    train(tmp_path / "a", sets, "run.steps=6", "valid.every=1000", *settings, nproc=1)
    plain = Run(tmp_path / "a", "")
    interrupted = train(tmp_path / "b", sets, "run.steps=6", *settings, nproc=1)
    (tmp_path / "b/checkpoints/00000006").rename(tmp_path / "gone")
    (tmp_path / "b/DONE").unlink()
    train(tmp_path / "b", sets, "run.steps=6", *settings, nproc=1)
    assert validated(interrupted) == validated(alone)
    assert losses(interrupted) == losses(plain)
    a, b = (open_checkpoint(run.folder.checkpoint(6)) for run in (plain, alone))
    left, right = a.tensors("master"), b.tensors("master")
    assert all(left[name].equal(right[name]) for name in left)


def test_rows_and_curves_have_the_scalars_of_every_set(sets: Any, tmp_path: Path) -> None:
    names = ("speech", "vision", "text")
    shards = {name: str(sets[name]) for name in names}
    run = Run(tmp_path, "joint_tiny", *joint_sets.SMALL, f"data.shards={shards}".replace("'", ""))
    settings = ["run.steps=2", "optim.warmup_steps=1", "valid.every=2", "engine.config=local"]
    valid = f"data.valid={shards}".replace("'", "")
    done = run.train(*settings, valid, "valid.samples=8", nproc=1)
    assert done.returncode == 0, done.stderr
    row = run.rows()[-1]
    of_sets = [row[f"valid_loss/{name}"] for name in names]
    assert row["valid_loss"] == pytest.approx(np.mean(of_sets))
    assert f"validation: loss/speech {of_sets[0]:.4g}" in done.stdout
    events = EventAccumulator(str(run.folder.tensorboard))
    events.Reload()
    tags = events.Tags()["scalars"]
    assert {"valid/loss", "valid/loss/text", "valid/explained_share/vision"} <= set(tags)


def test_a_run_that_overfits_shows_it(tmp_path: Path) -> None:
    """Trained on four texts: the loss on them falls, the loss on others of the same kind rises."""
    few = joint_sets.write_texts(tmp_path / "few", 4)
    others = joint_sets.write_texts(tmp_path / "others", 32, seed=1)
    run = Run(
        tmp_path / "run",
        "text_tiny",
        *(f"modality.text.{name}" for name in ("vocab_size=64", "mask_id=63", "max_tokens=40")),
        *("model.depth=2", "target.top_k=2", "batch.size=200", "batch.micro_batches=1"),
        *("optim.warmup_steps=20", "log.every=50", "valid.every=50", "save.every=1000"),
        *(f"data.shards={few}", f"data.valid={others}", "data.workers=0", "engine.config=local"),
    )
    done = run.train("run.steps=200", nproc=1)
    assert done.returncode == 0, done.stderr
    first, *_, last = run.rows()
    assert last["loss"] < 0.8 * first["loss"] and last["valid_loss"] > 1.05 * first["valid_loss"]
    assert last["explained_share"] > last["valid_explained_share"] + 0.2


# ------------------------------------------------------------------------------ best checkpoints


def test_the_best_checkpoints_are_kept(sets: Any, tmp_path: Path) -> None:
    settings = ["run.steps=10", "save.keep=1", "save.keep_best=2", "engine.config=local"]
    run = train(tmp_path, sets, *settings, nproc=1)
    scores = validated(run)
    best = sorted(sorted(scores), key=lambda step: scores[step])
    assert run.folder.steps() == sorted({10, *best[:2]})
    assert (run.folder.checkpoints / "best").resolve().name == f"{best[0]:08d}"
    state = open_checkpoint(run.folder.checkpoint(10)).state["train"]
    assert state["best"]["step"] == best[0] and state["score"] == scores[10]


def test_a_run_without_improvement_ends_and_stays_ended(sets: Any, tmp_path: Path) -> None:
    """The learning rate is so low that no weight changes."""
    settings = ["run.steps=40", "finetune.patience=2", "engine.config=local", "optim.lr=1e-30"]
    run = train(tmp_path, sets, *settings, nproc=1)
    assert run.rows()[-1]["step"] == 6 and run.folder.done.exists()
    log = next((tmp_path / "logs").glob("*/rank00000.txt")).read_text()
    assert "finished at step 6: no better validation in 2; loss " in log
    again = run.train(*settings, nproc=1)
    assert again.returncode == 0 and run.rows()[-1]["step"] == 6


def test_judge() -> None:
    loss, accuracy = Judge("valid_loss", True, 2), Judge("valid_accuracy", False)
    assert loss.score({"valid_loss": 2.0}) == 2.0 and loss.score({}) is None
    assert accuracy.score({"valid_accuracy": 0.5}) == -0.5
    best = loss.progress({}, 1, 2.0)
    best = loss.progress(best, 2, 2.5)
    assert best == {"step": 1, "score": 2.0, "since": 1} and not loss.exhausted(best)
    assert loss.exhausted(loss.progress(best, 3, float("inf")))
    assert loss.score({"valid_loss": float("nan")}) > 1e300  # type: ignore[operator]
    with pytest.raises(UserError, match=r"save\.best: the validation has no 'wer' \(it has: loss"):
        Judge("valid_wer", True).score({"valid_loss": 1.0})


def test_chosen_lots_are_evenly_spaced() -> None:
    class Lot:
        samples = range(4)

    lots: Any = [Lot() for _ in range(10)]
    assert chosen(lots, 0) == lots == chosen(lots, 40)
    assert chosen(lots, 8) == [lots[0], lots[5]] and chosen(lots, 1) == [lots[0]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["data.valid=/nowhere"], "/nowhere"),
        (["data.valid={text}"], "holds text, but speech is required"),
        (["data.valid={speech}", "batch.size=0.1"], "batch.size: 0.1 s in 4 micro-batches"),
        (
            ["data.valid={speech}", "save.keep_best=1", "save.every=3", "valid.every=2"],
            "save.every: must be a multiple of valid.every=2 if save.keep_best is set, got 3",
        ),
        (["data.valid={speech}", "save.best=wer"], "save.best: the validation has no 'wer'"),
        (["data.valid.smell=x"], "data.valid.smell: no modality 'smell' in this run"),
    ],
)
def test_bad_input_is_one_line(
    sets: Any, tmp_path: Path, settings: list[str], message: str
) -> None:
    words = [word.format(**sets) for word in settings]
    run = Run(tmp_path, "speech_tiny", *SPEECH, f"data.shards={sets['speech']}", *words)
    done = run.train("run.steps=2", "engine.config=local", nproc=1)
    assert done.returncode == 2 and message in done.stderr, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
