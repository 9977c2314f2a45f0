"""The tiny recipes learn from the bundled corpora: no sign of collapse after a few steps, settings
known to collapse do collapse, and complete runs beat the untrained encoder."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from d2v_ds import recipes
from d2v_ds.errors import UserError
from d2v_ds.pretrain import Pretrain
from d2v_ds.run import status
from shards import samples
from shards.cli import main as shards_main
from tests import ROOT
from tests.helpers.runs import Run, environment

TEXT = samples.path("text")
SOURCES = {
    "speech": [samples.path("speech") / "train.tsv", "--join", "speaker", "--join-seconds", "4"],
    "vision": [samples.path("images") / "train"],
    "text": [
        *(TEXT / "train.txt.gz", "--tokenizer", TEXT / "tokenizer.model"),
        *("--block", "128", "--document", "blank-line"),
    ],
}
COMMANDS = {"speech": "speech", "vision": "images", "text": "text"}
BATCH = {"speech": 2.01, "vision": 8.0, "text": 512.0}  # a quarter of the recipes' batch size
TINY = [name for name in recipes.GROUPS["pre-training"] if "_tiny" in name]


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The shard set of each modality."""
    root = tmp_path_factory.mktemp("sets")
    for name, (source, *options) in SOURCES.items():
        words = [COMMANDS[name], source, root / name, *options]
        assert shards_main([str(word) for word in words]) == 0
    return {name: root / name for name in SOURCES}


def last_row(recipe: str, root: Path, sets: dict[str, Path], steps: int, *more: str) -> Any:
    """The last row of metrics of a run with `steps` steps and a quarter of the batch size."""
    names = list(recipes.load(recipe, []).modality)
    run = Run(
        root / "run",
        recipe,
        *(f"data.shards.{name}={sets[name]}" for name in names if len(names) > 1),
        *(f"data.shards={sets[name]}" for name in names if len(names) == 1),
        *(f"batch.size.{name}={BATCH[name]}" for name in names if len(names) > 1),
        *(f"batch.size={BATCH[name]}" for name in names if len(names) == 1),
        "batch.micro_batches=1",
        f"run.steps={steps}",
        f"optim.warmup_steps={steps // 8}",
        f"teacher.anneal_steps={steps * 3 // 4}",
        "run.threads=1",
        "engine.config=local",
        "data.workers=0",
        "log.every=20",
        *more,
    )
    done = run.train(nproc=1)
    assert done.returncode == 0, done.stdout + done.stderr
    return run.rows()[-1]


def signs_of_collapse(row: dict[str, Any], of: str = "") -> list[str]:
    """The signs of collapse in a row of metrics. of: "/MODALITY" in a joint run."""
    value = {name.removesuffix(of): row[name] for name in row if name.endswith(of)}
    signs = {
        "the front end's output is constant": value["front_end_spread"] < 0.1,
        "targets are constant": value["target_spread"] < 0.3,
        "targets lie on a line": value["target_rank"] < 2.5,
        "targets are all but known": value["explained_share"] > 0.9,
        "predictions are worse than the mean": value["explained_share"] < -0.1,
        # Spread between samples at one position. Images agree more at a position than sounds.
        "targets tell places": value["target_sample_spread"] < 0.4 * value["target_spread"],
    }
    return [name for name, shown in signs.items() if shown]


@pytest.mark.parametrize("recipe", TINY)
def test_no_sign_of_collapse(recipe: str, tmp_path: Path, sets: dict[str, Path]) -> None:
    names = list(recipes.load(recipe, []).modality)
    row = last_row(recipe, tmp_path, sets, 30 * len(names))
    for name in names:
        assert not signs_of_collapse(row, f"/{name}" if len(names) > 1 else ""), row


def test_position_std_sets_only_the_initial_positions_of_text() -> None:
    weights = []
    for std in (0.02, 0.005):
        torch.manual_seed(0)
        setting = f"modality.text.position_std={std}"
        task = Pretrain.create(
            recipes.load("text_base", ["model.depth=1", "target.top_k=1", setting])
        )
        weights.append(dict(task.student.named_parameters()))
    name = "encoder.front_ends.text.features.positions.weight"
    published, smaller = (of.pop(name) for of in weights)
    assert published.std().item() == pytest.approx(0.02, rel=0.01)
    torch.testing.assert_close(smaller, published / 4)
    assert all(value.equal(weights[1][name]) for name, value in weights[0].items())
    with pytest.raises(UserError, match=r"modality.text.position_std: must be 0 or more, got -1"):
        Pretrain.create(recipes.load("text_tiny", ["modality.text.position_std=-1"]))


@pytest.mark.slow
def test_a_decoder_that_is_not_initialised_to_zero_collapses(
    tmp_path: Path, sets: dict[str, Path]
) -> None:
    """On crops of one second, the front end collapses while the predictions seem to improve."""
    settings = ["crop_seconds=1.005", "views=4", "decoder.zero_last=false"]
    more = [*(f"modality.speech.{setting}" for setting in settings), "batch.size=4.02"]
    row = last_row("speech_tiny", tmp_path, sets, 120, *more)
    assert "the front end's output is constant" in signs_of_collapse(row), row
    assert row["explained_share"] > 0.4


@pytest.mark.slow
def test_positions_dominate_the_text_targets(tmp_path: Path, sets: dict[str, Path]) -> None:
    """With the published initialisation of positions and embeddings shared with the teacher."""
    more = ["modality.text.position_std=0.02", "modality.text.shared=[features]", "optim.lr=2e-3"]
    row = last_row("text_tiny", tmp_path, sets, 200, *more)
    assert "targets tell places" in signs_of_collapse(row), row


@pytest.mark.slow
@pytest.mark.parametrize("modality", ["speech", "vision", "text", "joint"])
def test_whole_runs_learn(modality: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks/probe.py", modality, "--out", tmp_path],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=1800,
        env=environment(),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])["0"]
    for name in {"speech", "vision"} & found.keys():
        accuracy = found[name]
        gain = accuracy["trained student"]["unseen"] - accuracy["untrained encoder"]["unseen"]
        assert gain > 0.08, accuracy
    if "text" in found:
        assert found["order of words"]["trained model"]["4 swapped"] > 0.8
    row = status.last_row(tmp_path / "metrics.jsonl")  # the probe's own row comes after it
    assert row
    for name in found.keys() & set(SOURCES):
        assert not signs_of_collapse(row, f"/{name}" if modality == "joint" else ""), row
