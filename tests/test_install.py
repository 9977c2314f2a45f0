"""The wheel works in any folder, without the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests import ROOT


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--outdir", str(out), str(ROOT)],
        check=True,
        capture_output=True,
        text=True,
        timeout=300,
    )
    [path] = out.glob("*.whl")
    return path


def test_the_wheel_contains_all_files_that_runs_need(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"d2v_ds/ds_configs/zero{stage}.json" for stage in range(4)} <= names
    assert {"d2v_ds/slurm/pretrain.sbatch", "d2v_ds/py.typed"} <= names
    assert {"shards/samples/speech/train.tsv", "shards/samples/speech/README.md"} <= names
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not any(name.startswith(("tests/", "benchmarks/", "ds_configs/")) for name in names)


def test_an_installed_wheel_works_from_an_empty_folder(wheel: Path, tmp_path: Path) -> None:
    """Installs only the wheel, in a new folder; dependencies come from this environment."""
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", site, wheel],
        check=True,
        capture_output=True,
    )
    environment = {**os.environ, "PYTHONPATH": str(site)}

    def run(*words: str) -> str:
        done = subprocess.run(
            words, cwd=empty, env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "93,783,308" in run(str(site / "bin/d2v-ds"), "show", "speech_base")
    assert "speech_tiny" in run(str(site / "bin/d2v-ds"), "recipes")
    assert "SOURCE" in run(str(site / "bin/d2v-shards"), "speech", "--help")
    code = (
        "import d2v_ds, shards.samples as s; from d2v_ds.files import resource;"
        "print(d2v_ds.__file__, s.path('speech'), resource('ds_configs', 'zero2.json').read_text())"
    )
    printed = run(sys.executable, "-c", code)
    assert printed.count(str(site)) == 2 and '"stage": 2' in printed
