"""Starting from weights: what is copied, what is reported, and what is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from d2v_ds.config.decoding import to_dict
from d2v_ds.errors import UserError
from d2v_ds.pretrain import Pretrain
from d2v_ds.run.run_folder import RunFolder
from d2v_ds.start import start_from_weights, text_sets
from d2v_ds.weights import Weights, Which, initialise, open_weights
from shards import samples
from tests.export import helpers as exported
from tests.helpers import joint_sets, variants
from tests.helpers.runs import Run

WEIGHTS: tuple[Which, ...] = ("student", "teacher")


def weights_of(task: Pretrain, settings: dict[str, Any]) -> Weights:
    """The weights of a task, as a source has them."""

    def tensors(part: str) -> dict[str, torch.Tensor]:
        return {
            name.removeprefix(f"{part}."): parameter.detach().clone()
            for name, parameter in task.named_parameters()
            if name.startswith(f"{part}.")
        }

    return Weights(Path("source"), settings["model"], settings["modality"], tensors, step=7)


def settings_of(variant: str, *overrides: str) -> dict[str, Any]:
    config = to_dict(Pretrain.resolve(variants.config(variant, *overrides)))
    return {"model": config["model"], "modality": config["modality"]}


def trained(variant: str, *overrides: str) -> tuple[Pretrain, Weights]:
    """A task in which student and teacher differ from each other and from a new task."""
    task = variants.build(variant, *overrides)
    with torch.no_grad():
        for parameter in task.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return task, weights_of(task, settings_of(variant, *overrides))


@pytest.mark.parametrize("which", WEIGHTS)
@pytest.mark.parametrize("variant", variants.VARIANTS)
def test_student_and_teacher_start_from_the_chosen_weights(variant: str, which: Which) -> None:
    source, weights = trained(variant)
    task = variants.build(variant)
    done = initialise(task, weights, which, (), settings_of(variant))
    assert not done.new and not done.unused and not done.skipped and not done.settings
    ours, theirs = dict(task.named_parameters()), dict(source.named_parameters())
    averaged = {student: name for name, student in source.averages().items()}
    for name in (n for n in ours if n.startswith("student.")):
        origin = averaged.get(name, name) if which == "teacher" else name
        assert torch.equal(ours[name], theirs[origin]), name
    for average, student in task.averages().items():
        assert torch.equal(ours[average], ours[student])


def test_a_new_predictor_is_reported_and_random() -> None:
    _, weights = trained("v2_speech")
    decoder = "modality.speech.decoder.dim=32"
    task = variants.build("v2_speech", decoder)
    before = task.student.predictors.state_dict()
    settings = settings_of("v2_speech", decoder)
    with pytest.raises(UserError, match=r"shapes differ: predictors\.speech\.convs\.0\.weight is"):
        initialise(task, weights, "student", (), settings)
    done = initialise(task, weights, "student", ("predictors.*",), settings)
    assert done.skipped and all(name.startswith("predictors.") for name in done.skipped)
    assert all(name.startswith("encoder.") for name in done.copied)
    for name, value in before.items():
        assert torch.equal(value, task.student.predictors.state_dict()[name])
    assert done.settings == ["modality.speech.decoder.dim was 16, is 32"]
    report = "\n".join(done.lines())
    assert "parameters from source (student, step 7): encoder.front_ends.speech" in report
    assert "named in init_skip, so with random values: predictors.speech" in report


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["model.dim=64"],
            r"shapes differ: encoder\.\S+ is \[.*\] in init, \[.*\] here.* and \d+ m",
        ),
        (["model.depth=4"], r"another encoder: init lacks encoder\.trunk\.blocks\.3\.attent"),
        (["model.depth=2"], r"another encoder: this model lacks encoder\.trunk\.blocks\.2\.atten"),
        (
            ["model.heads=8", "modality.speech.alibi=false"],
            r"another model\.heads: 4, here 8\. Set",
        ),
        (["model.norm=pre"], r"another model\.norm: 'post', here 'pre'. Set model.norm to"),
    ],
)
def test_another_model_is_an_error(overrides: list[str], message: str) -> None:
    _, weights = trained("v2_speech", "model.heads=4")
    task = variants.build("v2_speech", *overrides)
    with pytest.raises(UserError, match=message):
        initialise(task, weights, "student", (), settings_of("v2_speech", *overrides))


def test_deeper_models_start_from_shallower_ones_if_the_blocks_are_named() -> None:
    _, weights = trained("v2_speech")
    task = variants.build("v2_speech", "model.depth=4")
    settings = settings_of("v2_speech", "model.depth=4")
    done = initialise(task, weights, "student", ("encoder.trunk.blocks.3.*",), settings)
    assert "encoder.trunk.blocks.2.norm1.weight" in done.copied and not done.new
    with pytest.raises(UserError, match=r"init_skip: 'encoder\.trunk\.block\.\*' matches no par"):
        initialise(task, weights, "student", ("encoder.trunk.block.*",), settings)


def test_weights_that_are_not_finite_are_an_error() -> None:
    source, weights = trained("v2_text")
    with torch.no_grad():
        source.student.encoder.trunk.blocks[0].norm1.weight[0] = float("inf")
    with pytest.raises(UserError, match=r"blocks\.0\.norm1\.weight has values that are NaN or inf"):
        initialise(variants.build("v2_text"), weights, "student", (), settings_of("v2_text"))


def test_another_modality_is_an_error() -> None:
    _, weights = trained("v2_speech")
    task = variants.build("v2_text")
    with pytest.raises(UserError, match="has speech, this run has text; none is in both"):
        initialise(task, weights, "student", (), settings_of("v2_text"))


def test_text_of_another_tokenizer_is_an_error(tmp_path: Path) -> None:
    """The weights are an export, which has its tokenizer."""
    settings = [f"modality.text.{each}" for each in ("vocab_size=4096", "mask_id=4095", "pad_id=1")]
    model = samples.path("text") / "tokenizer.model"
    exported.write(exported.weights_of("v2_text", *settings), tmp_path / "export", tokenizer=model)
    shards = joint_sets.write_texts(tmp_path / "text", 4)
    index = json.loads((shards / "index.json").read_text())
    index["tokenizer"] = {"sha256": hashlib.sha256(model.read_bytes()).hexdigest()}
    (shards / "index.json").write_text(json.dumps(index))
    init = [f"init={tmp_path / 'export'}", f"data.shards={shards}"]
    skip = "init_skip=[encoder.front_ends.text.features.tokens.weight]"

    def begin(*overrides: str) -> None:
        config = Pretrain.resolve(variants.config("v2_text", *settings, *init, *overrides))
        start_from_weights(Pretrain.create(config), config, RunFolder(tmp_path), text_sets(config))

    begin()
    index["tokenizer"]["sha256"] = "0" * 64
    (shards / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"^init: .*export was trained with another tokenizer"):
        begin()
    begin(skip)


# ---------------------------------------------------------------------------------- a whole run


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return joint_sets.write_all(tmp_path_factory.mktemp("sets"))


@pytest.fixture(scope="module")
def first(sets: Any, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A joint run, whose trunk and front ends others start from."""
    root = tmp_path_factory.mktemp("first") / "run"
    run = Run(root, "joint_tiny", *joint_sets.SMALL, joint_sets.shards_setting(sets))
    settings = ["run.steps=4", "optim.warmup_steps=1", "save.every=2", "engine.config=local"]
    done = run.train(*settings, nproc=1)
    assert done.returncode == 0, done.stderr
    return run


@pytest.mark.parametrize(
    ("engine", "nproc"), [("local", 1), pytest.param("zero2", 2, marks=pytest.mark.slow)]
)
def test_a_run_continues_on_another_corpus_with_new_counters(
    first: Run, sets: Any, tmp_path: Path, engine: str, nproc: int
) -> None:
    """The second run has fewer modalities, and resumes without reading `init` again."""
    settings = [*joint_sets.SMALL, joint_sets.shards_setting(sets)]
    drop = ["modality.vision=null", f"init={first.folder.checkpoint(2)}", "init_from=teacher"]
    steps = ["optim.warmup_steps=2", "save.every=2", f"engine.config={engine}", "log.every=1"]
    run = Run(tmp_path / "run", "joint_tiny", *settings, *drop, *steps)
    done = run.train("run.steps=2", "optim.lr=1e-12", nproc=nproc)
    assert done.returncode == 0, done.stderr
    assert "init: " in done.stdout and "in init but not in this model, so not used: " in done.stdout
    report = json.loads(run.folder.init.read_text())
    assert report["which"] == "teacher" and report["step"] == 2 and not report["new"]
    assert any(name.startswith("encoder.front_ends.vision.") for name in report["unused"])

    started, expected = open_weights(run.folder.root), open_weights(first.folder.checkpoint(2))
    assert started.step == 2  # its own
    ours, teachers, theirs = (
        started.encoder(),
        started.encoder("teacher"),
        expected.encoder("teacher"),
    )
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], atol=1e-9, rtol=1e-6)
        torch.testing.assert_close(teachers[name], theirs[name], atol=1e-9, rtol=1e-6)

    (tmp_path / "elsewhere").mkdir()
    moved = Run(tmp_path / "run", "joint_tiny", *settings, *steps, "modality.vision=null")
    refused = moved.train("run.steps=4", "optim.lr=1e-12", nproc=nproc)
    assert refused.returncode == 2 and "init was" in refused.stderr
    resumed = moved.train(
        *("run.steps=4", "optim.lr=1e-12", "init=/gone", "init_from=teacher", "--allow", "init"),
        nproc=nproc,
    )
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming at step 2" in resumed.stdout and "init: " not in resumed.stdout


def test_a_damaged_checkpoint_is_refused_also_by_its_own_path(first: Run, tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    copied = shutil.copytree(first.folder.checkpoint(2), run.checkpoint(2))
    [file] = copied.glob("rank*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match="SHA-256 differs from what was written; use another check"):
        open_weights(copied)
    with pytest.raises(UserError, match=r"none of the 1 checkpoints is valid; choose another run$"):
        open_weights(run.root)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["init=/nowhere"], "init: /nowhere: no such file or folder; name a run folder"),
        (
            ["init={first}", "model.depth=3"],
            "is another encoder: init lacks encoder.trunk.blocks.2",
        ),
        (["init={first}", "init_from=nothing"], "init_from: nothing is for fine-tuning"),
        (["init={first}/logs"], "/logs: neither a checkpoint nor a run folder with a checkpoint"),
    ],
)
def test_bad_input_is_one_line(
    first: Run, sets: Any, tmp_path: Path, settings: list[str], message: str
) -> None:
    words = [*joint_sets.SMALL, joint_sets.shards_setting(sets), "engine.config=local"]
    words += ["optim.warmup_steps=1"]
    words += [word.format(first=first.folder.root) for word in settings]
    done = Run(tmp_path / "run", "joint_tiny", *words).train("run.steps=4", nproc=1)
    assert done.returncode == 2 and message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and "Traceback" not in done.stderr
