"""The run folder: paths, claims and atomic writes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from d2v_ds.errors import Superseded
from d2v_ds.files import write_atomically
from d2v_ds.run.run_folder import (
    Generation,
    RunFolder,
    claim_generation,
    read_generation,
    refuse_superseded,
)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "runs" / "demo")


def test_paths(run: RunFolder) -> None:
    generation = Generation(3, "4711", 2, "node:1")
    assert run.log(generation, 5) == run.root / "logs/4711.2/rank00005.txt"
    assert run.checkpoint(600) == run.root / "checkpoints/00000600"
    assert run.checkpoint(123456789).name == "123456789"
    assert not run.root.exists()


def test_steps_are_sorted_by_number_and_only_published_ones(run: RunFolder) -> None:
    assert run.steps() == []
    for name in ("00000010", "00000009", "123456789", ".00000011.1.tmp", "notes"):
        (run.checkpoints / name).mkdir(parents=True)
    assert run.steps() == [9, 10, 123456789]


def test_each_start_gets_a_higher_generation(run: RunFolder) -> None:
    assert read_generation(run) is None
    starts = [claim_generation(run, "local") for _ in range(3)]
    assert [(s.number, s.restart) for s in starts] == [(1, 0), (2, 1), (3, 2)]
    job = claim_generation(run, "4711", 0)
    assert (job.number, job.restart) == (4, 0)
    assert read_generation(run) == job


def test_only_the_owner_may_write(run: RunFolder) -> None:
    first = claim_generation(run, "4711", 0)
    refuse_superseded(run, first)
    second = claim_generation(run, "4711", 1)
    refuse_superseded(run, second)
    with pytest.raises(Superseded, match=r"owned by generation 2 .*; generation 1 \(job 4711"):
        refuse_superseded(run, first)


def test_a_late_claim_of_an_earlier_restart_is_refused(run: RunFolder) -> None:
    owner = claim_generation(run, "4711", 1)
    with pytest.raises(Superseded, match="restart 0 is older than the owner"):
        claim_generation(run, "4711", 0)
    assert read_generation(run) == owner


def test_two_claims_at_the_same_moment_have_one_winner(run: RunFolder) -> None:
    ours = claim_generation(run, "local")
    assert ours.process.endswith(f":{os.getpid()}")
    theirs = Generation(ours.number, ours.job, ours.restart, "elsewhere:1")
    with pytest.raises(Superseded):
        refuse_superseded(run, theirs)


def test_write_atomically_leaves_no_other_file(tmp_path: Path) -> None:
    for text in ("one", "two"):
        write_atomically(tmp_path / "STOPPED", text)
        assert (tmp_path / "STOPPED").read_text() == text
    assert [p.name for p in tmp_path.iterdir()] == ["STOPPED"]


def test_writes_of_a_superseded_start_are_lost(run: RunFolder) -> None:
    """Covers metrics and TensorBoard events, whose files the superseded start still has open."""
    claim_generation(run, "4711", 0)
    run.tensorboard.mkdir()
    files = [run.metrics, run.tensorboard / "events.out.tfevents.1.node.1.0"]
    opened = [path.open("a") for path in files]
    for file in opened:
        file.write("before\n")
        file.flush()
    claim_generation(run, "4711", 1)
    for file in opened:
        file.write("after\n")
        file.close()
    assert [path.read_text() for path in files] == ["before\n", "before\n"]
    assert len(list(run.tensorboard.iterdir())) == 1


def test_needs_no_torch() -> None:
    code = "import sys, d2v_ds.run.run_folder; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
