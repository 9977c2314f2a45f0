"""The record of a run's environment and code, without secrets."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from d2v_ds.run import environment


def test_secrets_are_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = {
        "HF_TOKEN": "hf_s3cret",
        "AWS_SECRET_ACCESS_KEY": "s3cret",
        "WANDB_API_KEY": "s3cret",
    }
    for name, value in {**secrets, "NCCL_DEBUG": "WARN", "MY_PASSWORD": "s3cret"}.items():
        monkeypatch.setenv(name, value)
    text = json.dumps(environment.describe(["vn1", "vn1", "vn2"]))
    described = json.loads(text)
    assert "s3cret" not in text
    assert described["environment"]["HF_TOKEN"] == "***"
    assert described["environment"]["NCCL_DEBUG"] == "WARN"
    assert described["nodes"] == ["vn1", "vn1", "vn2"]


def test_the_code_is_stored_once_and_can_be_run(tmp_path: Path) -> None:
    path = environment.keep_code(tmp_path / "code")
    assert path.name == f"{environment.code_hash()}.tar.gz"
    before = path.stat().st_mtime_ns
    assert environment.keep_code(tmp_path / "code") == path and path.stat().st_mtime_ns == before
    with tarfile.open(path) as tar:
        tar.extractall(tmp_path / "out", filter="data")
    code = (
        "from d2v_ds.run import environment; print(environment.code_hash(), environment.__file__)"
    )
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, cwd=tmp_path / "out", capture_output=True, text=True, check=True)
    hash, file = done.stdout.split()
    assert hash == environment.code_hash() and Path(file).is_relative_to(tmp_path / "out")


def test_other_code_has_another_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "d2v_ds"
    package.mkdir()
    monkeypatch.setattr(environment, "PACKAGE", package)
    (package / "a.py").write_text("x = 1\n")
    one = environment.code_hash()
    (package / "__pycache__").mkdir()
    (package / "__pycache__/a.pyc").write_bytes(b"1")
    assert environment.code_hash() == one
    (package / "a.py").write_text("x = 2\n")
    assert environment.code_hash() != one


def test_a_node_has_the_name_that_slurm_gives_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "gpu17")
    assert environment.node_name() == "gpu17"
    monkeypatch.delenv("SLURMD_NODENAME")
    assert environment.node_name()
