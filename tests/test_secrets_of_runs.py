"""What a run stores and prints holds no secrets, and the run still resumes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import joint_sets

SECRET = "s3cr3t-v4lue"
ENVIRONMENT = {
    "SLURM_JWT": SECRET,
    "HF_ENDPOINT": f"https://me:{SECRET}@host",
    "WANDB_BASE_URL": f"https://{SECRET}@host",
    "HF_TOKEN": SECRET,
    "AWS_SECRET_ACCESS_KEY": SECRET,
    "D2V_NOTE": f"curl -u me:{SECRET} https://host",
    "NCCL_DEBUG": "WARN",
}


def train(source: str, *settings: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "d2v_ds", "train", source, *settings, "engine.config=local"]
    quick = ["data.workers=0", "optim.warmup_steps=0", "save.every=1", "batch.size=4"]
    return subprocess.run(
        [*command, *quick, "batch.micro_batches=1"],
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
    )


def files_with(folder: Path, secret: str) -> list[str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 10
    return [str(path) for path in files if secret.encode() in path.read_bytes()]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return joint_sets.write_images(tmp_path_factory.mktemp("sets") / "vision", 8)


def test_no_file_of_a_run_holds_a_secret_and_it_resumes(shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"

    def piped(token: str) -> str:
        return f"data.shards='pipe:cat {shards}/{{}} && : --token={token}'"

    done = train("vision_tiny", piped(SECRET), f"run.dir={run}", "run.steps=1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert SECRET not in done.stdout + done.stderr
    assert files_with(run, SECRET) == []
    stored = json.loads((run / "environment.json").read_text())
    assert "--token=***" in " ".join(stored["command"])
    assert stored["environment"]["HF_ENDPOINT"] == "https://***@host"
    assert stored["environment"]["NCCL_DEBUG"] == "WARN"
    assert stored["environment"]["SLURM_JWT"] == "***"
    assert (run / "environment.json").stat().st_mode & 0o777 == 0o600

    again = train(str(run / "config.yaml"), f"run.dir={run}", "run.steps=2")
    assert again.returncode == 2 and again.stderr.count("\n") == 1
    assert again.stderr.startswith("d2v-ds: data.shards: ")
    assert "has *** in place of a secret" in again.stderr and "data.shards=..." in again.stderr

    other = f"other-{SECRET}"  # a token that was renewed
    resumed = train(str(run / "config.yaml"), piped(other), f"run.dir={run}", "run.steps=2")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert "resuming at step 1" in resumed.stdout and files_with(run, SECRET) == []


def test_messages_hold_no_secrets() -> None:
    done = train("vision_tiny", f"optim.lr=https://me:{SECRET}@host")
    assert done.returncode == 2 and SECRET not in done.stderr
    assert done.stderr == "d2v-ds: optim.lr: expected a number, got 'https://***@host'\n"
