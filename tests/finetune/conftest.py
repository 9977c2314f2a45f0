"""Shard sets, a small pre-trained run, and fine-tuning runs that start from it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import ROOT
from tests.finetune.tuning import Tuning, tuning
from tests.helpers import joint_sets
from tests.helpers.runs import Run

DIGITS = "zero one two three four five six seven eight nine".split()


@pytest.fixture(scope="session")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The sets of joint_sets, and recordings of digits: `spoken`, with transcripts, and `silent`,
    with empty ones."""
    root = tmp_path_factory.mktemp("sets")
    sets = joint_sets.write_all(root)
    recordings = sorted((ROOT / "shards/samples/speech").glob("**/*.flac"))[:40]
    for name in ("spoken", "silent"):
        texts = [DIGITS[int(p.stem[0])] * (name == "spoken") for p in recordings]
        rows = [
            {"audio_filepath": str(p), "text": t} for p, t in zip(recordings, texts, strict=True)
        ]
        manifest = root / f"{name}.jsonl"
        manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
        words = ["speech", str(manifest), str(root / name), "-j", "1"]
        assert joint_sets.shards_main(words) == 0
        sets[name] = root / name
    return sets


@pytest.fixture(scope="session")
def pretrained(sets: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A joint run of two steps."""
    root = tmp_path_factory.mktemp("pretrained") / "run"
    names = {name: sets[name] for name in ("speech", "vision", "text")}
    run = Run(root, "joint_tiny", *joint_sets.SMALL, joint_sets.shards_setting(names))
    settings = ["run.steps=2", "optim.warmup_steps=1", "save.every=2", "engine.config=local"]
    done = run.train(*settings, nproc=1)
    assert done.returncode == 0, done.stderr
    return root


@pytest.fixture(scope="session")
def tuned(
    sets: dict[str, Path], pretrained: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Tuning]:
    """{modality: a run of four steps, validated on its training set}."""
    runs = {}
    for modality in ("speech", "vision", "text"):
        root = tmp_path_factory.mktemp(modality) / "run"
        run = runs[modality] = tuning(root, modality, sets, pretrained, "engine.config=local")
        data = sets["spoken" if modality == "speech" else modality]
        words = [f"data.valid={data}", "valid.every=2", "save.every=2", "save.keep=3"]
        words += ["optim.decay_steps=1"] * (modality == "speech")
        run.tune("run.steps=4", "optim.lr=1e-2", *words)
    return runs
