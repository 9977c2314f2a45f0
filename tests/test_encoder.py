"""A trained encoder, loaded as a plain module from a run folder or checkpoint, gives the same
features as inside the task."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from d2v_ds.encoder import PretrainedEncoder, encoder_of, load_encoder
from d2v_ds.errors import UserError
from d2v_ds.weights import Which
from tests.helpers import joint_sets, variants
from tests.helpers.runs import Run

WEIGHTS: tuple[Which, ...] = ("student", "teacher")


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("variant", variants.VARIANTS)
def test_it_gives_the_features_of_the_task(variant: str, weights: Which) -> None:
    task = variants.build(variant).eval()
    with torch.no_grad():  # otherwise teacher and student are equal
        for parameter in task.teacher.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    modality = variants.modality_of(task)
    examples = variants.examples(task, 30, 40)
    batch = modality.unmasked(examples)
    student = task.student.encoder
    with torch.no_grad():
        tokens = student.features(batch)
        if weights == "teacher":
            layers = task.teacher.layers(student, batch, tokens, len(student.trunk.blocks))
        else:
            _, _, layers = student.whole(batch, tokens, collect=len(student.trunk.blocks))
        found = encoder_of(task, modality.name, weights)(examples)
    assert len(found.blocks) == len(layers) == 3
    for ours, (_, expected) in zip(found.blocks, layers, strict=True):
        assert torch.equal(ours, expected)
    lengths = [variants.tokens_of(modality, example) for example in examples]
    if found.valid is not None:
        assert found.valid.sum(1).tolist() == lengths


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("variant", variants.VARIANTS)
def test_a_padded_batch_gives_what_single_examples_give(variant: str, weights: Which) -> None:
    task = variants.build(variant).eval()
    modality = variants.modality_of(task)
    encoder = encoder_of(task, modality.name, weights)
    examples = variants.examples(task, 30, 17, 38)
    with torch.no_grad():
        together = encoder(examples)
        assert (together.valid is None) == (variant not in variants.RAGGED)
        for i, example in enumerate(examples):
            alone = encoder([example])
            T = alone.blocks[0].shape[1]
            assert alone.valid is None and T == variants.tokens_of(modality, example)
            for layer in range(1, encoder.depth + 1):
                torch.testing.assert_close(
                    together.blocks[layer - 1][i, :T], alone.blocks[layer - 1][0]
                )
                torch.testing.assert_close(together.pooled(layer)[i], alone.pooled(layer)[0])
    for outside in (-1, 0, encoder.depth + 1):
        with pytest.raises(UserError, match=f"blocks 1 to {encoder.depth}, got {outside}"):
            together.pooled(outside)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    root = tmp_path_factory.mktemp("run")
    sets = joint_sets.write_all(root / "sets")
    run = Run(root / "run", "joint_tiny", *joint_sets.SMALL, joint_sets.shards_setting(sets))
    settings = ["run.steps=6", "optim.warmup_steps=1", "save.every=3", "engine.config=local"]
    done = run.train(*settings, nproc=1)
    assert done.returncode == 0, done.stderr
    return run


def features(encoder: PretrainedEncoder) -> torch.Tensor:
    rng = np.random.default_rng(0)
    with torch.no_grad():
        return encoder([rng.integers(4, 60, n) for n in (20, 33)]).blocks[-1]


def test_a_run_and_its_checkpoints_load(run: Run) -> None:
    newest = load_encoder(run.folder.root, modality="text")
    assert newest.step == 6 and newest.weights == "student" and not newest.training
    assert torch.equal(
        features(newest), features(load_encoder(run.folder.checkpoint(6), modality="text"))
    )
    older = load_encoder(run.folder.checkpoint(3), modality="text")
    assert older.step == 3 and not torch.equal(features(older), features(newest))
    teacher = load_encoder(run.folder.root, weights="teacher", modality="text")
    assert not torch.equal(features(teacher), features(newest))


def test_padding_does_not_influence_features(run: Run) -> None:
    encoder = load_encoder(run.folder.root, modality="speech")
    rng = np.random.default_rng(0)
    waveforms = [rng.standard_normal(n).astype(np.float32) for n in (4000, 9000, 6100)]
    with torch.no_grad():
        blocks, valid = encoder(waveforms)
        assert valid is not None
        for i, waveform in enumerate(waveforms):
            alone = encoder([waveform]).blocks
            T = alone[0].shape[1]
            assert int(valid[i].sum()) == T
            for padded, single in zip(blocks, alone, strict=True):
                torch.testing.assert_close(padded[i, :T], single[0], rtol=1e-4, atol=1e-5)


def test_it_can_be_fine_tuned(run: Run) -> None:
    encoder = load_encoder(run.folder.root, modality="text").train()
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.1)
    before = features(encoder.eval())
    encoder.train()([np.arange(4, 24)]).blocks[-1].square().mean().backward()
    optimizer.step()
    assert not torch.equal(features(encoder.eval()), before)


def test_fine_tuning_reaches_every_parameter_of_the_encoder() -> None:
    for variant in variants.VARIANTS:
        encoder = encoder_of(variants.build(variant), variant[3:], "student").train()
        examples = variants.examples(variants.build(variant), 30, 17)
        encoder(examples).pooled(encoder.depth).square().sum().backward()
        # The mask token is used only in pre-training; the class token reaches the patches through
        # attention, and the final norm belongs to the pre-training head.
        unused = ("mask_token.embedding", "trunk.norm.weight", "trunk.norm.bias")
        for name, parameter in encoder.named_parameters():
            assert (parameter.grad is None) == name.endswith(unused), f"{variant}: {name}"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("variant", variants.VARIANTS)
def test_a_gpu_gives_the_features_of_the_cpu(variant: str) -> None:
    task = variants.build(variant).eval()
    encoder = encoder_of(task, variants.modality_of(task).name, "student")
    examples = variants.examples(task, 30, 17)
    with torch.no_grad():
        expected = encoder(examples).pooled(2)
        found = encoder.to("cuda")(examples).pooled(2)
    assert found.device.type == "cuda"
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-3, atol=1e-3)


def test_encode_goes_through_many_examples_in_small_batches() -> None:
    task = variants.build("v2_text").eval()
    encoder = encoder_of(task, "text", "student")
    examples = variants.examples(task, *range(10, 27))
    with torch.no_grad():
        expected = [encoder([example]).pooled(2)[0] for example in examples]
    found: dict[int, torch.Tensor] = {}
    for group, output in encoder.encode(examples, batch=5):
        assert len(group) <= 5
        found.update(zip(group, output.pooled(2), strict=True))
    assert sorted(found) == list(range(17))
    for i, features in found.items():
        torch.testing.assert_close(features, expected[i])


def test_errors_are_one_line(run: Run, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"this run has several; name one \(it has: speech, text, vis"
    ):
        load_encoder(run.folder.root)
    with pytest.raises(UserError, match="no 'smell' in this run"):
        load_encoder(run.folder.root, modality="smell")
    with pytest.raises(UserError, match="neither a checkpoint nor a run folder"):
        load_encoder(tmp_path)


def test_it_needs_no_deepspeed(run: Run) -> None:
    code = (
        "import sys, d2v_ds; assert 'torch' not in sys.modules; "
        f"encoder = d2v_ds.load_encoder({str(run.folder.root)!r}, modality='text'); "
        "assert isinstance(encoder, __import__('torch').nn.Module); "
        "assert 'deepspeed' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
