"""Probes of checkpoints in a process beside training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from d2v_ds import recipes
from d2v_ds.errors import UserError
from d2v_ds.probing import Probing
from d2v_ds.run.run_folder import RunFolder
from tests.helpers import joint_sets
from tests.helpers.runs import Run


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return joint_sets.write_images(tmp_path_factory.mktemp("sets") / "images", 40)


def run_of(root: Path, images: Path, *settings: str) -> Run:
    small = [w for w in joint_sets.SMALL if "vision" in w and "batch" not in w]
    trunk = ["model.dim=32", "model.depth=2", "target.top_k=2", "batch.size=8"]
    words = [*small, *trunk, f"data.shards={images}", "optim.warmup_steps=1", "data.workers=0"]
    return Run(root, "vision_tiny", *words, "engine.config=local", *settings)


def test_checkpoints_are_probed_beside_training(images: Path, tmp_path: Path) -> None:
    probe = [f"probe.train={images}", f"probe.test={images}", "probe.kind=ridge", "probe.layer=2"]
    run = run_of(tmp_path / "run", images, *probe, "save.every=2", "save.keep=10")
    done = run.train("run.steps=4", nproc=1)
    assert done.returncode == 0, done.stderr
    lines = (run.folder.root / "evaluations.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    assert found[-1]["step"] == 4 and found[-1]["layer"] == 2  # the last one is always probed
    [accuracy] = found[-1]["accuracy"]["trained student"].values()
    assert f"checkpoint 4: ridge accuracy of vision {100 * accuracy:.1f} %" in done.stdout
    events = EventAccumulator(str(run.folder.tensorboard / "eval" / "student"))
    events.Reload()
    [tag] = events.Tags()["scalars"]
    assert tag.startswith("eval/ridge/") and events.Scalars(tag)[-1].step == 4
    resumed = run.train("run.steps=4", nproc=1)
    assert resumed.returncode == 0 and "ridge accuracy" not in resumed.stdout  # probed already


def test_a_failing_probe_is_a_warning(images: Path, tmp_path: Path) -> None:
    probe = [f"probe.train={images}", f"probe.test={images}", "probe.label=colour"]
    run = run_of(tmp_path / "run", images, *probe, "save.every=2")
    done = run.train("run.steps=2", nproc=1)
    assert done.returncode == 0 and run.folder.done.exists()
    assert "the probe of checkpoint 2 failed: d2v-ds: " in done.stdout
    assert "its .json has no 'colour'" in done.stdout


def test_checkpoints_published_during_a_probe_are_told(
    images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of several new checkpoints only the newest is probed."""
    settings = [f"probe.train={images}", f"probe.test={images}", f"run.dir={tmp_path}"]
    config = recipes.load("vision_tiny", [*settings, f"data.shards={images}"])
    for step in (2, 4, 6):
        (tmp_path / "checkpoints" / f"{step:08d}").mkdir(parents=True)
    probing = Probing(config, RunFolder(tmp_path), tmp_path, probed=2)
    with caplog.at_level("INFO", logger="d2v_ds"):
        probing.poll()
    assert probing.running is not None and probing.running.step == 6
    assert "not probed, because another probe was running: checkpoints [4]" in caplog.text
    process = probing.running.process
    probing.close()
    assert process.poll() is not None


def test_half_a_probe_is_an_error() -> None:
    with pytest.raises(UserError, match=r"probe: needs both probe\.train and probe\.test"):
        recipes.load("vision_tiny", ["probe.train=/x"])
