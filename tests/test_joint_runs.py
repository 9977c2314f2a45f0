"""A joint run over speech, images and text, started the way users start it: resume after a kill,
the files it writes, and the commands that read them."""

from __future__ import annotations

import json
import signal
from collections import Counter
from pathlib import Path

import pytest

from d2v_ds import recipes, show
from d2v_ds.checkpoint import open_checkpoint
from d2v_ds.cli import main
from d2v_ds.config import modality_of
from d2v_ds.errors import UserError
from d2v_ds.evaluate import run_knn
from d2v_ds.loader.mixture import shares_of, source_of
from d2v_ds.run import status
from d2v_ds.run.preflight import check
from tests.helpers import joint_sets
from tests.helpers.joint_sets import SMALL, shards_setting
from tests.helpers.runs import Run, assert_equal_runs, ranks_of

STEPS = 14
GB, MB = 10**9, 10**6
QUICK = [
    *SMALL,
    f"run.steps={STEPS}",
    "optim.warmup_steps=3",
    "data.weights={speech: 2, vision/a: 1, vision/b: 1, text: 1}",
    "log.every=1",
    "log.pictures_every=6",
    "save.every=4",
]


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("sets")
    return {
        **joint_sets.write_all(root),
        "more": joint_sets.write_images(root / "more", 12, seed=1),
    }


def joint_run(root: Path, sets: dict[str, Path], *settings: str) -> Run:
    """A joint run with two image corpora."""
    sources = {"speech": sets["speech"], "vision/a": sets["vision"], "text": sets["text"]}
    sources["vision/b"] = sets["more"]
    return Run(root, "joint_tiny", shards_setting(sources), *QUICK, *settings)


@pytest.fixture(scope="module")
def undisturbed(sets: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = joint_run(tmp_path_factory.mktemp("undisturbed") / "run", sets)
    done = run.train()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "an epoch of vision/a, 20.0% of the steps: 5 steps, 40 samples" in done.stdout
    return run


def planned_sources(run: Run) -> list[str]:
    """The source of every step."""
    config = recipes.load("joint_tiny", run.settings)
    shares, names = shares_of(config), list(config.sources)
    return [names[source_of(shares, config.run.seed, step)] for step in range(STEPS)]


def planned(run: Run) -> list[str]:
    """The modality of every step."""
    return [modality_of(source) for source in planned_sources(run)]


def test_rows_report_the_modality_of_their_step(undisturbed: Run) -> None:
    updated = []
    for row in undisturbed.rows():
        [modality] = [name.partition("/")[2] for name in row if name.startswith("loss")]
        updated.append(modality)
        for name in ("front_end_spread", "target_sample_spread", "target_rank", "grad_norm"):
            assert row[f"{name}/{modality}"] > 0
        assert 0.2 < row[f"masked_share/{modality}"] < 0.8
        assert {f"epoch/{s}" for s in ("speech", "vision/a", "vision/b", "text")} <= row.keys()
        assert "lr" in row and ("audio_h_per_h" in row) == (modality == "speech")
    assert updated == planned(undisturbed) and set(updated) == {"speech", "vision", "text"}
    assert len(set(planned_sources(undisturbed))) == 4


def test_curves_and_pictures_of_each_modality_are_in_tensorboard(undisturbed: Run) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(undisturbed.folder.tensorboard), size_guidance={"images": 0})
    events.Reload()
    tags, counts = events.Tags(), Counter(planned(undisturbed))
    for name, steps in counts.items():
        for tag in (f"loss/{name}", f"repr/std_target/{name}", f"repr/rank_target/{name}"):
            assert len(events.Scalars(tag)) == steps, tag
    assert "loss/total" not in tags["scalars"] and "optim/lr" in tags["scalars"]
    assert set(tags["images"]) == {f"mask/{name}" for name in set(planned(undisturbed)[6:])}


@pytest.mark.slow
def test_a_killed_run_resumes_bit_exactly(
    undisturbed: Run, sets: dict[str, Path], tmp_path: Path
) -> None:
    run = joint_run(tmp_path / "run", sets)
    process = run.start()
    run.wait_for_step(6, process)
    ranks_of(process)[1].send_signal(signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert process.returncode not in (0, 2) and not run.folder.done.exists(), output
    done = run.train()
    assert done.returncode == 0 and "resuming at step" in done.stdout, done.stdout + done.stderr
    assert_equal_runs(run, undisturbed)
    state = open_checkpoint(run.folder.checkpoint(STEPS)).state["train"]
    assert state["cursor"].keys() == set(planned_sources(run))
    assert state["units"].keys() == {"speech", "vision", "text"}


def test_a_part_counts_the_steps_of_its_modality(undisturbed: Run) -> None:
    steps = open_checkpoint(undisturbed.folder.checkpoint(STEPS)).adam_steps
    counts = Counter(planned(undisturbed))
    for name in ("speech", "vision", "text"):
        own = {n: s for n, s in steps.items() if name in n.split(".")}
        assert own and set(own.values()) == {counts[name]}
    trunk = {n: s for n, s in steps.items() if n.startswith("student.encoder.trunk")}
    assert trunk and set(trunk.values()) == {STEPS}


def test_the_encoder_is_probed_for_one_modality(undisturbed: Run, tmp_path: Path) -> None:
    root = undisturbed.folder.root
    sets = {
        "vision": [joint_sets.write_images(tmp_path / f"v{i}", 16, seed=i) for i in range(2)],
        "text": [joint_sets.write_texts(tmp_path / f"t{i}", 16, seed=i) for i in range(2)],
    }
    for modality, (gallery, test) in sets.items():
        table, summary = run_knn(
            root, gallery=str(gallery), tests=[str(test)], modality=modality, compare=True
        )
        assert summary["gallery"] == 16 and f"{test.name} (16)" in table
        assert len(summary["accuracy"]) == 4
    gallery, test = map(str, sets["vision"])
    with pytest.raises(UserError, match="this run has several; name one"):
        run_knn(root, gallery=gallery, tests=[test])
    with pytest.raises(UserError, match="holds vision, but text is required"):
        run_knn(root, gallery=gallery, tests=[test], modality="text")


def test_status_shows_the_modalities(undisturbed: Run) -> None:
    [line] = [s for s in status.describe(undisturbed.folder.root).splitlines() if "modal" in s]
    last = undisturbed.rows()[-1]
    [loss] = [name for name in last if name.startswith("loss/")]
    assert f"{loss.partition('/')[2]} (loss {last[loss]:.3f})" in line
    assert all(name in line for name in ("speech", "vision", "text"))


def test_show_reports_parameters_memory_and_batches_by_modality() -> None:
    text = show.describe(recipes.load("joint_base", []), 8)
    counts = {
        line.split()[-2]: int(line.split()[-1].replace(",", ""))
        for line in text.splitlines()
        if line.startswith("  ") and line.split()[-1].replace(",", "").isdecimal()
    }
    names = ("shared", "speech", "vision", "text")
    assert sum(counts[name] for name in names) == counts["student"] == 165_019_916
    assert "a step of vision (256 images) is split into 16 micro-batches of at most 16 im" in text
    assert "shares of the steps: speech 22.5%, vision 21.1%, text 56.3%" in text
    assert "on 8 ranks, each rank computes 2 micro-batches per step" in text
    config = recipes.load("joint_tiny", SMALL)
    assert "that fits all modalities: engine.config=zero" in show.describe(config, 1, GB)
    assert "the run does not fit at any ZeRO stage, because not" in show.describe(config, 1, MB)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["data.shards=/one"],
            "data.shards: is a single set, but the run has 3 modalities; give one p",
        ),
        (["batch.size=8"], "batch.size: is a single number, but the run has 3 modalities; give on"),
        (
            ["batch.size={speech: 8, text: 8}"],
            "batch.size.vision: must be given (given: speech, tex",
        ),
        (["batch.size.vision=0"], "batch.size.vision: must be above 0, got 0"),
        (
            ["batch.size.smell=1"],
            "batch.size.smell: no modality 'smell' in this run (it has: speech",
        ),
        (["batch.size.text=many"], "batch.size.text: expected a number, got 'many'"),
        (["batch.size=many"], "batch.size: expected a number, got 'many'"),
        (
            ["data.shards.smell=/a"],
            "data.shards.smell: no modality 'smell' in this run (it has: spe",
        ),
        (["data.weights.text=0"], "data.weights.text: must be above 0, got 0"),
        (["data.weights={speech: 1}"], "data.weights.vision: must be given, because other sources"),
        (
            ["data.shards={speech/a: /a, speech/b: /b, vision: /c, text: /d}"],
            "data.weights.speech: no such source in this run (it has: speech/a, speech/b, vision",
        ),
        (["modality.text.loss_weight=0"], "modality.text.loss_weight: must be above 0, got 0.0"),
    ],
)
def test_a_wrong_setting_of_a_joint_run_is_named(settings: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        show.describe(recipes.load("joint_tiny", settings), 1)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_missing_and_wrong_shards_of_a_joint_run_are_named(sets: dict[str, Path]) -> None:
    def refused(**given: str) -> str:
        shards = {name: str(sets[name]) for name in ("speech", "vision", "text")} | given
        shown = ", ".join(f"{name}: '{path}'" for name, path in shards.items() if path != "-")
        with pytest.raises(UserError) as caught:
            check(recipes.load("joint_tiny", [f"data.shards={{{shown}}}"]), 1)
        return str(caught.value)

    assert refused(text="").startswith("data.shards.text: must name a shard set, for example")
    assert refused(vision="-") == "data.shards.vision: must be given (given: speech, text)"
    assert refused(text=str(sets["vision"])).endswith("holds vision, but text is required")
    with pytest.raises(UserError, match=r"data\.shards\.speech: must name a shard set"):
        check(recipes.load("joint_tiny", []), 1)


def test_a_modality_that_is_null_is_left_out() -> None:
    config = recipes.load("joint_tiny", ["modality.text=null", "data.weights.speech=3"])
    assert list(config.modality) == ["speech", "vision"] == list(config.sources)
    assert config.batch.size == {"speech": 8.05, "vision": 32.0}
    assert config.data.weights == {"speech": 3.0, "vision": 1.0}


def test_the_command_names_a_modality_that_is_missing(
    undisturbed: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["evaluate", "knn", str(undisturbed.folder.root), "--gallery", "a", "--test", "b"]
    assert main([*words, "--modality", "smell"]) == 2
    assert "no 'smell' in this run (it has: speech, text, vision)" in capsys.readouterr().err
    assert json.loads(undisturbed.folder.done.read_text())["step"] == STEPS
