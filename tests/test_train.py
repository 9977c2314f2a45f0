"""Runs started by the `train` command: real shards, DeepSpeed on two ranks, kills and resumes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from d2v_ds.run.run_folder import claim_generation
from shards import samples
from shards.cli import main as shards_main
from tests.helpers.runs import Run, assert_equal_runs, ranks_of

QUICK = [
    "modality.speech.views=2",
    "model.dim=32",
    "model.depth=2",
    "model.layer_drop=0.2",
    "model.dropout=0.1",
    "target.top_k=2",
    "modality.speech.convs="
    "[[8, 10, 5], [8, 3, 2], [8, 3, 2], [16, 3, 2], [16, 3, 2], [16, 2, 2], [16, 2, 2]]",
    "modality.speech.positions.groups=4",
    "modality.speech.decoder={dim: 16, depth: 2, kernel: 5, groups: 4, dropout: 0.1}",
    "modality.speech.crop_seconds=0.8",
    "modality.speech.min_seconds=0.4",
    "optim.warmup_steps=3",
    "log.every=1",
    "log.pictures_every=8",
]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shards") / "train"
    source = samples.path("speech") / "train.tsv"
    join = ["--join", "speaker", "--join-seconds", "4"]
    assert shards_main(["speech", str(source), str(out), *join]) == 0
    return out


def speech_run(root: Path, shards: Path, *settings: str) -> Run:
    return Run(root, "speech_tiny", f"data.shards={shards}", *QUICK, *settings)


@pytest.fixture(scope="module")
def undisturbed(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    run = speech_run(tmp_path_factory.mktemp("undisturbed") / "run", shards, "run.steps=16")
    done = run.train("save.every=4")
    assert done.returncode == 0, done.stdout + done.stderr
    yield run


def test_a_run_writes_the_documented_files(undisturbed: Run) -> None:
    run = undisturbed.folder
    assert list(undisturbed.losses()) == list(range(1, 17))
    assert run.steps() == [8, 12, 16]  # the newest three of save.every=4
    assert json.loads(run.done.read_text())["step"] == 16 and not run.stopped.exists()
    assert {path.name for path in (run.root / "logs/local.0").iterdir()} == {
        "rank00000.txt",
        "rank00001.txt",
    }
    assert {path.name for path in run.heartbeat.iterdir()} == {"rank00000.json", "rank00001.json"}
    described = json.loads(run.environment.read_text())
    assert described["versions"]["torch"] and described["command"]
    assert all("SECRET" not in value for value in described["environment"].values())


def test_the_curves_are_in_tensorboard(undisturbed: Run) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(undisturbed.folder.tensorboard), size_guidance={"images": 0})
    events.Reload()
    tags = events.Tags()
    wanted = {
        "loss/total",
        "optim/lr",
        "ema/decay",
        "optim/grad_norm",
        "repr/std_target",
        "repr/std_prediction",
        "repr/std_front_end_time",
        "repr/explained_share",
        "mask/share",
        "perf/samples_s",
        "perf/audio_h_per_h",
        "data/wait_share",
    }
    assert wanted <= set(tags["scalars"])
    assert [event.step for event in events.Scalars("loss/total")] == list(range(1, 17))
    assert tags["images"] == ["mask/speech"]
    [configuration] = events.Tensors("configuration/text_summary")
    assert b"crop_seconds: 0.8" in configuration.tensor_proto.string_val[0]
    [data] = events.Tensors("data/text_summary")
    assert b"an epoch: " in data.tensor_proto.string_val[0]
    shares = [event.value for event in events.Scalars("mask/share")]
    assert all(0.45 < share <= 0.5 for share in shares)


def test_a_finished_run_says_so_and_new_is_refused(undisturbed: Run, shards: Path) -> None:
    again = undisturbed.train()
    assert again.returncode == 0 and "finished at step 16" in again.stdout
    refused = undisturbed.train("--new")
    assert refused.returncode == 2
    assert "holds checkpoints up to step 16, and --new was given" in refused.stderr


def test_a_changed_model_is_refused_by_name(undisturbed: Run) -> None:
    refused = undisturbed.train("model.depth=3", nproc=1)
    assert refused.returncode == 2
    [line] = refused.stderr.strip().splitlines()
    assert "model.depth was 2, is 3" in line and "--allow model.depth" in line


@pytest.mark.parametrize("stage", ["zero2", pytest.param("zero3", marks=pytest.mark.slow)])
def test_a_run_whose_rank_was_killed_resumes_bit_exactly(
    stage: str, undisturbed: Run, shards: Path, tmp_path: Path
) -> None:
    """Kills one rank (kill -9); the launcher stops the other; the same command resumes."""
    settings = ["run.steps=16", "save.every=4", f"engine.config={stage}"]
    run = speech_run(tmp_path / "run", shards, *settings)
    process = run.start()
    run.wait_for_step(6, process)
    victim = ranks_of(process)[1]
    victim.send_signal(signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert process.returncode not in (0, 2), output
    assert run.folder.steps() and not run.folder.done.exists()
    done = run.train()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "resuming at step" in done.stdout
    if stage == "zero2":  # the stage of the undisturbed run
        assert_equal_runs(run, undisturbed)
    else:
        expected = undisturbed.losses()
        assert run.losses() == pytest.approx(expected, rel=1e-5)
        other = speech_run(tmp_path / "whole", shards, *settings)
        assert other.train().returncode == 0
        assert_equal_runs(run, other)


@pytest.mark.parametrize(
    "how", ["SIGTERM", *(pytest.param(how, marks=pytest.mark.slow) for how in ("SIGUSR2", "STOP"))]
)
def test_a_stopped_run_saves_and_resumes_bit_exactly(
    how: str, undisturbed: Run, shards: Path, tmp_path: Path
) -> None:
    run = speech_run(tmp_path / "run", shards, "run.steps=16", "save.every=100")
    process = run.start()
    run.wait_for_step(3, process)
    if how == "STOP":
        run.folder.stop.touch()
    else:
        process.send_signal(signal.Signals[how])
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    stopped = json.loads(run.folder.stopped.read_text())
    assert how in stopped["reason"] and run.folder.steps() == [stopped["step"]]
    if how == "STOP":
        refused = run.train()
        assert refused.returncode == 2 and "this file stops the run; remove it" in refused.stderr
        run.folder.stop.unlink()
    done = run.train()
    assert done.returncode == 0, done.stdout + done.stderr
    assert not run.folder.stopped.exists() and run.folder.done.exists()
    assert_equal_runs(run, undisturbed)


@pytest.mark.slow
def test_a_checkpoint_of_one_stage_loads_into_another(
    undisturbed: Run, shards: Path, tmp_path: Path
) -> None:
    """Half of the run under ZeRO 1 on two ranks, half on the local engine: the same losses."""
    run = speech_run(tmp_path / "run", shards)
    first = run.train("run.steps=8", "engine.config=zero1", "optim.schedule=constant")
    assert first.returncode == 0, first.stdout + first.stderr
    settings = ["run.steps=16", "engine.config=local", "optim.schedule=constant"]
    second = run.train(*settings, nproc=1)
    assert second.returncode == 0, second.stdout + second.stderr
    whole = speech_run(tmp_path / "whole", shards)
    assert whole.train(*settings, nproc=1).returncode == 0
    assert run.losses() == pytest.approx(whole.losses(), rel=2e-5)


def test_a_run_folder_that_was_taken_over_is_not_written(shards: Path, tmp_path: Path) -> None:
    run = speech_run(tmp_path / "run", shards, "run.steps=400", "save.every=3")
    process = run.start(nproc=1)
    run.wait_for_step(4, process)
    saved = run.folder.steps()
    claim_generation(run.folder, "another", 0)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and "is owned by generation" in output
    assert set(run.folder.steps()) <= {*saved, 6}


@pytest.mark.parametrize(
    ("more", "nproc", "message"),
    [
        (["data.shards=/nowhere"], 1, "/nowhere"),
        (["data.shards="], 1, "data.shards: must name a shard set"),
        (["batch.micro_batches=3"], 2, "batch.micro_batches: 3 is not divisible by 2 ranks. Use "),
        (["engine.config=local"], 2, "engine.config: local runs on one rank, but this run has"),
        (["engine.config=zero9"], 1, "did you mean"),
        (["engine.precision=fp16"], 1, "engine.precision: fp16 needs a GPU"),
        (["batch.size=0.1"], 1, "batch.size: 0.1 s in 4 micro-batches"),
        (["modality.speech.sample_rate=8000"], 1, "8000"),
        (["modality.speech.min_seconds=0.01"], 1, "min_seconds=0.01 is shorter than two frames"),
    ],
)
def test_user_errors_are_one_line_and_exit_code_2(
    more: list[str], nproc: int, message: str, shards: Path, tmp_path: Path
) -> None:
    done = speech_run(tmp_path / "run", shards).train(*more, nproc=nproc)
    assert done.returncode == 2, done.stdout + done.stderr
    lines = [line for line in done.stderr.strip().splitlines() if "d2v-ds:" in line]
    assert len(lines) == 1 and message in lines[0], done.stderr
    assert "Traceback" not in done.stderr


def test_status_of_a_finished_run(undisturbed: Run) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "d2v_ds", "status", str(undisturbed.folder.root)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "state        finished: all 16 steps" in done.stdout
    assert "step         16 of 16" in done.stdout
    assert "checkpoint   step 16 (of 3 kept)" in done.stdout
    assert "slowest rank" in done.stdout
