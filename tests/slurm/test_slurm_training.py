"""The real trainer under the real batch script: what a disturbed run loses is nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cluster import Job, Workplace

from d2v_ds.run_folder import RunFolder
from d2v_ds.status import describe
from shards import samples
from shards.cli import main as shards_main

TINY = (
    "modality.speech.views=2",
    "model.dim=32",
    "model.depth=2",
    "target.top_k=2",
    "modality.speech.convs="
    "[[8, 10, 5], [8, 3, 2], [8, 3, 2], [16, 3, 2], [16, 3, 2], [16, 2, 2], [16, 2, 2]]",
    "modality.speech.positions.groups=4",
    "modality.speech.decoder={dim: 16, depth: 2, kernel: 5, groups: 4, dropout: 0.1}",
    "modality.speech.crop_seconds=0.8",
    "modality.speech.min_seconds=0.4",
    "optim.warmup_steps=3",
    "engine.config=zero3",
    "log.every=1",
    "data.workers=1",
)
TWO_NODES = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=2")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shards") / "train"
    source = samples.path("speech") / "train.tsv"
    join = ["--join", "speaker", "--join-seconds", "4"]
    assert shards_main(["speech", str(source), str(out), *join]) == 0
    return out


class Run:
    def __init__(self, place: Workplace, shards: Path, name: str, *settings: str) -> None:
        self.place, self.folder = place, RunFolder(place.folder / "runs" / name)
        self.words = ["speech_tiny", f"run.dir=runs/{name}", f"data.shards={shards}"]
        self.words += [*TINY, *settings]

    def submit(self, *options: str) -> Job:
        return self.place.submit("pretrain.sbatch", *self.words, options=(*TWO_NODES, *options))

    def losses(self) -> dict[int, float]:
        rows = self.place.rows(f"runs/{self.folder.root.name}")
        steps = [row["step"] for row in rows]
        assert steps == sorted(set(steps)), f"rows overlap: {steps}"
        return {row["step"]: row["loss"] for row in rows}

    def curve(self) -> list[int]:
        """The steps of the loss that TensorBoard shows."""
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(self.folder.tensorboard))
        events.Reload()
        return [event.step for event in events.Scalars("loss/total")]


STEPS = 40


def test_a_signalled_run_over_two_nodes_goes_on_as_if_nothing_had_been(
    trainer: Workplace, shards: Path
) -> None:
    settings = (f"run.steps={STEPS}", "save.every=100")
    run, other = (Run(trainer, shards, name, *settings) for name in ("run", "undisturbed"))
    job = run.submit()
    job.until(lambda: len(run.losses()) >= 3, "three steps", 120)
    status = describe(run.folder.root)
    assert "state        running: " in status and "slowest rank" in status
    job.signal()
    job.says("requeue: stopped well", 60)
    saved = run.folder.steps()
    undisturbed = other.submit()
    job.ends(seconds=150)
    undisturbed.ends(seconds=150)
    assert job.field("Restarts") == "1" and len(saved) == 1 and 3 <= saved[0] < STEPS
    assert f"resuming at step {saved[0]}" in job.log()
    assert list(run.losses()) == list(range(1, STEPS + 1)) == run.curve()
    assert run.losses() == other.losses()
    assert json.loads(run.folder.done.read_text())["step"] == STEPS
    described = json.loads(run.folder.environment.read_text())
    assert described["nodes"] == ["vn1", "vn2"]
    assert (run.folder.code / f"{described['code']}.tar.gz").is_file()
    assert {p.name for p in (run.folder.root / "logs").glob(f"{job.number}.*/rank*.txt")} == {
        "rank00000.txt",
        "rank00001.txt",
    }
