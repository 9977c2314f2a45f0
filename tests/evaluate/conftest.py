"""A short joint run and labelled sets, for all tests of evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers import joint_sets
from tests.helpers.runs import Run


@dataclass(frozen=True)
class Trained:
    """A run of two steps on texts and images, with a checkpoint after each step."""

    run: Run
    sets: dict[str, Path]

    @property
    def root(self) -> Path:
        return self.run.folder.root


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    root = tmp_path_factory.mktemp("evaluate")
    sets = {
        "text": joint_sets.write_texts(root / "sets/text", 40),
        "vision": joint_sets.write_images(root / "sets/vision", 40),
        "text test": joint_sets.write_texts(root / "sets/text_test", 24, seed=1),
        "vision test": joint_sets.write_images(root / "sets/vision_test", 24, seed=1),
        "speech": joint_sets.write_speech(root / "sets/speech"),
    }
    training = {name: sets[name] for name in ("speech", "text", "vision")}
    run = Run(root / "run", "joint_tiny", *joint_sets.SMALL, joint_sets.shards_setting(training))
    settings = ["run.steps=2", "optim.warmup_steps=1", "save.every=1", "engine.config=local"]
    done = run.train(*settings, nproc=1)
    assert done.returncode == 0, done.stderr
    return Trained(run, sets)
