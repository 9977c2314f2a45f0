"""The contract that every modality must fulfil, for all of the registry and one from outside the
package."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from d2v_ds import recipes, seeding
from d2v_ds.batch import Batch
from d2v_ds.cli import main
from d2v_ds.config import Config
from d2v_ds.data.shard_format import ShardSet, open_set
from d2v_ds.errors import UserError
from d2v_ds.loader.loader import Loader
from d2v_ds.loader.reading import read_samples
from d2v_ds.modalities import REGISTRY, create_modalities, modality_class
from d2v_ds.modalities.base import Modality, ModalityConfig
from d2v_ds.pretrain import Pretrain
from d2v_ds.step import StepSettings, train_step
from d2v_ds.telemetry.metrics import Accumulator
from d2v_ds.telemetry.pictures import masked_picture
from shards.cli import main as shards_main
from tests import ROOT
from tests.helpers import joint_sets, sensor
from tests.helpers.runs import Run, assert_equal_runs
from tests.helpers.series import series, write_set
from tests.helpers.steps import Losses, prepare

LENGTHS = [[200, 90, 300, 40] * 3, [120] * 8]

# A function per modality that writes a small shard set. The first test fails if one is missing.
SETS: dict[str, Callable[[Path], object]] = {
    "speech": joint_sets.write_speech,
    "vision": lambda root: joint_sets.write_images(root, 24),
    "text": lambda root: joint_sets.write_texts(root, 24),
    "series": lambda root: write_set(root, LENGTHS),
}


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(REGISTRY, "series", "tests.helpers.sensor:Sensor")
    monkeypatch.setitem(recipes.RECIPES, "series_tiny", sensor.series_tiny)


@dataclass(frozen=True)
class Case:
    config: Config
    modality: Modality
    shards: ShardSet

    def loader(self, **more: Any) -> Loader:
        size = self.config.batch_size(self.modality.name)
        return Loader(self.shards, self.modality, seed=1, size=size, micro_batches=4, **more)

    def samples(self, number: int) -> list[dict[str, bytes]]:
        keys = [key for key in self.modality.extensions if key in self.shards.fields]
        return [sample for _, sample in islice(read_samples(self.shards, keys), number)]

    def rng(self, *path: int) -> np.random.Generator:
        return seeding.generator(0, *path)


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sets")
    for name, write in SETS.items():
        write(root / name)
    return root


@pytest.fixture(params=[*REGISTRY, "series"])
def case(request: pytest.FixtureRequest, sets: Path) -> Case:
    name = request.param
    if name == "series":
        config = recipes.load("series_tiny", [])
    else:
        others = [f"modality.{other}=null" for other in ("speech", "vision", "text")]
        others.remove(f"modality.{name}=null")
        config = recipes.load("joint_tiny", [*joint_sets.SMALL, *others])
    [modality] = create_modalities(config.modality).values()
    return Case(config, modality, open_set(sets / name, name))


def test_every_modality_is_tested() -> None:
    assert SETS.keys() == REGISTRY.keys()


def test_it_is_registered_under_its_own_name(case: Case) -> None:
    modality = case.modality
    assert modality_class(modality.name) is type(modality)
    assert issubclass(modality.Config, ModalityConfig) and isinstance(
        modality.config, modality.Config
    )
    assert (
        modality.batch_unit
        and modality.length_unit
        and modality.extensions
        and modality.baseline_name
    )
    assert not any(key.startswith(".") for key in modality.extensions)
    with pytest.raises(UserError, match=rf"modality\.{modality.name}\.wrong: no such setting"):
        create_modalities({modality.name: {"wrong": 1}})


def test_decoding_depends_only_on_the_generator(case: Case) -> None:
    modality, samples = case.modality, case.samples(12)
    modality.check_set(case.shards.about)
    once = [modality.decode(s, case.rng(i)) for i, s in enumerate(samples)]
    again = [modality.decode(s, case.rng(i)) for i, s in enumerate(samples)]
    whole = [modality.decode(s, None) for s in samples]
    for a, b, w, sample in zip(once, again, whole, samples, strict=True):
        assert a.dtype == b.dtype and np.array_equal(a, b)
        assert np.array_equal(w, modality.decode(sample, None))
        assert a.size <= modality.largest().size and a.dtype == modality.largest().dtype
    other = [modality.decode(s, case.rng(99, i)) for i, s in enumerate(samples)]
    if modality.name != "speech":  # no recording is longer than a crop
        assert any(not np.array_equal(a, b) for a, b in zip(once, other, strict=True))


def test_undecodable_data_is_a_value_error(case: Case) -> None:
    broken = {key: b"\xff\xfe\xfd" * 40 for key in case.samples(1)[0]}
    with pytest.raises(ValueError, match=r"\w+ \w+"):
        case.modality.decode(broken, case.rng())


def test_masks_match_the_plan(case: Case) -> None:
    with closing(case.loader()) as loader:
        assert loader.plan.masked is not None
        for step in islice(loader, 6):
            assert step.count == sum(len(batch.masked) for batch in step.micro_batches)
            for i, batch in enumerate(step.micro_batches):
                assert batch.index == i
                check_masks(case, batch)


def check_masks(case: Case, batch: Batch) -> None:
    B, M = len(batch.keys), case.modality.views
    R, T = batch.seen.shape
    assert (batch.modality, batch.views, R) == (case.modality.name, M, B * M)
    flat = batch.seen.flatten()
    assert not flat[batch.masked].any(), "a masked token is visible"
    exists = torch.ones(B, T, dtype=torch.bool) if batch.valid is None else batch.valid
    exists = exists.repeat_interleave(M, 0).flatten()
    assert exists[batch.masked].all(), "padding is masked"
    assert int(exists.sum()) == int(flat.sum()) + len(batch.masked), "neither visible nor masked"
    by_view = (~batch.seen).sum(1)
    assert (by_view > 0).all() and (batch.seen.sum(1) > 0).all()


def test_a_sample_has_the_planned_number_of_masked_tokens(case: Case) -> None:
    lengths = read_lengths(case.shards)
    for i, sample in enumerate(case.samples(6)):
        if not case.modality.crop(lengths[i]):
            continue
        example = case.modality.decode(sample, case.rng(i))
        batch = case.modality.collate([example], [case.rng(1, i)], 0)
        assert len(batch.masked) == case.modality.masked_tokens(lengths[i])


def read_lengths(shards: ShardSet) -> list[int]:
    from d2v_ds.data.shard_index import read_index

    return [n for entry in shards.shards for n in read_index(shards.index(entry)).lengths]


def test_unmasked_batches_hide_nothing(case: Case) -> None:
    examples = [case.modality.decode(sample, None) for sample in case.samples(3)]
    batch = case.modality.unmasked(examples)
    assert batch.views == 1 and len(batch.masked) == 0 and len(batch.inputs) == 3
    shapes = {case.modality.baseline(example).shape for example in examples}
    assert len(shapes) == 1 and len(shapes.pop()) == 1


def test_plans_resume_and_do_not_depend_on_workers(case: Case) -> None:
    def content(loader: Loader, steps: int) -> list[Any]:
        with closing(loader):
            return [
                (step.cursor, [(b.keys, b.inputs.tolist(), b.masked.tolist()) for b in batches])
                for step in islice(loader, steps)
                for batches in [step.micro_batches]
            ]

    whole = content(case.loader(), 5)
    assert len({str(batches) for _, batches in whole}) == 5
    assert content(case.loader(workers=1), 5) == whole
    assert content(case.loader(cursor=whole[1][0]), 3) == whole[2:]


def build(case: Case) -> Pretrain:
    torch.manual_seed(0)
    return Pretrain.create(case.config).train()


def train(case: Case, steps: int) -> tuple[list[float], Pretrain, dict[str, float]]:
    """(losses of some optimizer steps, the task, the metrics over all steps)."""
    task = build(case)
    engine, ema = prepare(task, case.config.optim, accumulation=4)
    accumulator, losses = Accumulator(), []

    class Watching(Losses):
        def add(self, modality: str, sums: Any) -> None:
            super().add(modality, sums)
            accumulator.add(sums)

    with closing(case.loader()) as loader:
        for number, step in enumerate(islice(loader, steps)):
            watching = Watching()
            settings = StepSettings(step=number, lr=1e-3, weight_decay=0.01, ema_decay=0.9)
            assert train_step(engine, ema, step, settings, seed=0, observer=watching)
            losses.append(sum(watching.values))
    return losses, task, task.report.summarize(accumulator.reduce(), steps)


def test_steps_train_every_part_and_are_reproducible(case: Case) -> None:
    losses, task, metrics = train(case, 3)
    assert train(case, 3)[0] == losses and len(set(losses)) == 3
    before = dict(build(case).named_parameters())
    still = [n for n, p in task.named_parameters() if torch.equal(p, before[n])]
    # Predictions start at zero, so the first gradients reach only the last layer.
    assert not [name for name in still if name.startswith("student.encoder.trunk")], still
    assert any(name.startswith("teacher.") for name in before)
    assert all(np.isfinite(value) for value in metrics.values()), metrics
    assert metrics["front_end_spread"] > 0.1 and metrics["target_sample_spread"] > 0.1


def test_the_parts_of_a_modality_belong_to_it(case: Case) -> None:
    task, name = build(case), case.modality.name
    parts = {task.part(n) for n, _ in task.student.named_parameters(prefix="student")}
    assert parts == {"", name}
    assert all(
        task.part(n) == ("" if "trunk" in n.split(".")[2:3] else name)
        for n, _ in task.student.named_parameters(prefix="student")
    )


def test_it_can_be_shown(case: Case) -> None:
    with closing(case.loader()) as loader:
        batch = next(loader).micro_batches[0]
    picture = masked_picture(*case.modality.picture(batch))
    assert picture.ndim == 3 and picture.shape[2] == 3 and picture.std() > 0
    assert isinstance(case.modality.warnings(), list)
    assert case.modality.class_weight(4) >= 0


# ------------------------------------------------------------------- one from outside the package


class SensorRun(Run):
    def command(self, *more: str, nproc: int = 2) -> list[str]:
        words = ["train", self.recipe, *self.settings, *more]
        return [sys.executable, "-m", "tests.helpers.sensor", *words]


def test_a_modality_from_outside_trains_and_resumes_like_any_other(
    sets: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    settings = [f"data.shards={sets / 'series'}", "optim.warmup_steps=2", "log.every=1"]
    settings += ["optim.schedule=constant", "log.pictures_every=3", "engine.config=local"]
    run = SensorRun(tmp_path / "run", "series_tiny", *settings)
    whole = SensorRun(tmp_path / "whole", "series_tiny", *settings)
    for steps in ("run.steps=3", "run.steps=6"):
        done = run.train(steps)
        assert done.returncode == 0, done.stdout + done.stderr
    assert "resuming at step 3" in done.stdout
    assert whole.train("run.steps=6").returncode == 0
    assert len(run.losses()) == 6
    assert_equal_runs(run, whole)

    words = ["train", "series_tiny", *settings, "modality.series.crop=4"]
    assert main(["show", "series_tiny"]) == 0 and main(words) == 2
    output = capsys.readouterr()
    assert "encoder.front_ends.series.features" in output.out
    assert "modality.series: crop=4 is below least=8" in output.err


@pytest.mark.parametrize("jobs", ["-j1", "-j2"])
def test_d2v_shards_indexes_verifies_and_describes_a_modality_from_outside(
    jobs: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = write_set(tmp_path / "tars", LENGTHS)
    for file in made.root.iterdir():
        if file.suffix != ".tar":
            file.unlink()
    assert shards_main(["index", str(made.root), "--checksums", jobs]) == 0
    found = open_set(made.root, "series")
    assert (found.samples, found.length) == (made.samples, made.length)
    capsys.readouterr()
    assert shards_main(["verify", str(made.root), jobs]) == 0
    assert capsys.readouterr().out == f"{made.root}: no problems\n"
    assert shards_main(["stats", str(made.root)]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["modality", "series"] in rows and ["samples", str(made.samples)] in rows
    tar = made.root / "series-000000.tar"
    tar.write_bytes(tar.read_bytes().replace(series("s0-0", 200), b"\xff" * 400))
    assert shards_main(["verify", str(made.root), jobs]) == 1
    assert "sample 's0-0': the checksum of its .series differs" in capsys.readouterr().out
