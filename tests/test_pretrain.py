"""Invariants of the objective: what must not change a result, and what must."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from d2v_ds import masking, recipes, student
from d2v_ds.batch import Batch, mask_indices
from d2v_ds.loss import instance_norm, make_targets, regression_loss
from d2v_ds.modalities.speech import Speech, frames, pad
from d2v_ds.pretrain import Pretrain, build_pretrain, spread_over_time
from d2v_ds.transformer import Alibi, TransformerConfig, Trunk, alibi_slopes

CONVS = ((8, 10, 5), (8, 3, 2), (16, 3, 2), (16, 3, 2), (16, 3, 2), (16, 2, 2), (16, 2, 2))
SMALL = [
    "model.dim=32",
    "model.depth=3",
    "target.top_k=2",
    "modality.speech.views=3",
    f"modality.speech.convs={[list(c) for c in CONVS]}",
    "modality.speech.positions.groups=4",
    "modality.speech.decoder.dim=16",
    "modality.speech.decoder.groups=4",
    "modality.speech.decoder.zero_last=false",
    "modality.speech.min_seconds=0.1",
]


@pytest.fixture
def task() -> Pretrain:
    torch.manual_seed(0)
    return build_pretrain(recipes.load("speech_tiny", SMALL)).train()


@pytest.fixture(autouse=True)
def noise_by_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without noise in the masked slots results can be compared between batches."""
    monkeypatch.setattr(student, "mask_noise", lambda N, D, std, like: like.new_zeros(N, D))


def speech(task: Pretrain) -> Speech:
    modality = task.modalities["speech"]
    assert isinstance(modality, Speech)
    return modality


def waveforms(*lengths: int) -> list[Any]:
    rng = np.random.default_rng(1)
    return [rng.standard_normal(n).astype(np.float32) for n in lengths]


def masks(modality: Speech, examples: list[Any]) -> list[Any]:
    rngs = [masking.generator(0, i) for i in range(len(examples))]
    batch = modality.collate(examples, rngs, 0)
    T = [frames(len(e), modality.config.convs) for e in examples]
    seen = batch.seen.view(len(examples), modality.views, -1).numpy()
    return [~seen[i, :, :t] for i, t in enumerate(T)]


def make_batch(modality: Speech, examples: list[Any], drawn: list[Any]) -> Batch:
    return Batch(
        modality="speech",
        index=0,
        inputs=pad(examples),
        views=modality.views,
        **mask_indices(drawn),
    )


def test_padding_changes_nothing(task: Pretrain) -> None:
    """Samples of different length together give what each gives alone (gotchas of padding)."""
    examples = waveforms(9000, 16080, 12345)
    drawn = masks(speech(task), examples)
    together = make_batch(speech(task), examples, drawn)
    assert together.valid is not None and together.ragged
    loss, stats = task(together, 1)
    loss.backward()
    whole = {name: p.grad for name, p in task.student.named_parameters()}
    task.zero_grad()

    alone = [make_batch(speech(task), [e], [m]) for e, m in zip(examples, drawn, strict=True)]
    single = []
    for batch in alone:
        assert batch.valid is None and not batch.ragged
        part, _ = task(batch, 1)
        part.backward()
        single.append(part.detach())
    torch.testing.assert_close(loss.detach(), torch.stack(single).sum(), rtol=2e-5, atol=0)
    for name, parameter in task.student.named_parameters():
        torch.testing.assert_close(whole[name], parameter.grad, rtol=1e-3, atol=1e-4, msg=name)
    assert stats["masked"] == sum(batch.masked.numel() for batch in alone)
    assert stats["tokens"] == sum(m.size for m in drawn)


def test_the_order_of_samples_changes_nothing(task: Pretrain) -> None:
    examples = waveforms(9000, 16080)
    drawn = masks(speech(task), examples)
    first, _ = task(make_batch(speech(task), examples, drawn), 1)
    second, _ = task(make_batch(speech(task), examples[::-1], drawn[::-1]), 1)
    torch.testing.assert_close(first, second, rtol=1e-5, atol=0)


def test_the_loss_does_not_depend_on_how_a_batch_is_split(task: Pretrain) -> None:
    examples = waveforms(16080, 16080, 16080, 16080)
    drawn = masks(speech(task), examples)
    count = sum(int(m.sum()) for m in drawn)
    whole, _ = task(make_batch(speech(task), examples, drawn), count)
    halves = [
        task(make_batch(speech(task), examples[i : i + 2], drawn[i : i + 2]), count)[0]
        for i in (0, 2)
    ]
    torch.testing.assert_close(whole, halves[0] + halves[1], rtol=1e-5, atol=0)


def test_views_are_independent(task: Pretrain) -> None:
    """M views together equal M batches of one view each (M = 1 equivalence)."""
    [example] = waveforms(16080)
    [drawn] = masks(speech(task), [example])
    whole, _ = task(make_batch(speech(task), [example], [drawn]), 1)
    total = torch.zeros(())
    for view in drawn:
        batch = make_batch(speech(task), [example], [view[None]])
        total = total + task(dataclasses.replace(batch, views=1), 1)[0].detach()
    torch.testing.assert_close(whole.detach(), total, rtol=1e-5, atol=0)


def test_what_is_masked_never_reaches_the_student(task: Pretrain) -> None:
    [example] = waveforms(16080)
    batch = make_batch(speech(task), [example], masks(speech(task), [example]))
    encoder = task.student.encoder
    tokens = encoder.front_end("speech").features(batch.inputs)  # type: ignore[misc]
    before = encoder.views(batch, tokens)
    # frames that are masked in every view: nothing the student sees may depend on them
    never_seen = ~batch.seen.any(0)
    assert never_seen.any()
    changed = tokens.clone()
    changed[:, never_seen] += 100.0
    torch.testing.assert_close(encoder.views(batch, changed), before, rtol=0, atol=0)
    seen_changed = tokens + 0.1
    assert not torch.equal(encoder.views(batch, seen_changed), before)


def test_the_teacher_sees_everything_and_has_no_gradient(task: Pretrain) -> None:
    [example] = waveforms(16080)
    drawn = masks(speech(task), [example])
    batch = make_batch(speech(task), [example], drawn)
    tokens = task.student.encoder.front_end("speech").features(batch.inputs)  # type: ignore[misc]
    ffn = [ffn for ffn, _ in task.teacher.layers(task.student.encoder, batch, tokens, 2)]
    whole = make_batch(speech(task), [example], [np.zeros_like(drawn[0])])
    expected = task.teacher.layers(task.student.encoder, whole, tokens, 2)
    for ours, (theirs, _) in zip(ffn, expected, strict=True):
        assert torch.equal(ours, theirs) and not ours.requires_grad
    loss, _ = task(batch, 1)
    loss.backward()
    assert all(p.grad is None for p in task.teacher.parameters())
    assert all(p.grad is not None for p in task.student.parameters())
    assert not task.teacher.training and task.student.training


def test_targets_are_the_top_layers_ffn_outputs_before_the_residual(task: Pretrain) -> None:
    [example] = waveforms(16080)
    batch = make_batch(speech(task), [example], masks(speech(task), [example]))
    seen: list[Tensor] = []
    hooks = [
        block.ffn.fc2.register_forward_hook(lambda _m, _i, output: seen.append(output))
        for block in task.teacher.encoder.trunk.blocks
    ]
    tokens = task.student.encoder.front_end("speech").features(batch.inputs)  # type: ignore[misc]
    targets = task.targets(batch, tokens)
    for hook in hooks:
        hook.remove()
    expected = make_targets(seen[-2:], None, layer_norm="instance", final_norm="none")
    T = expected.shape[1]
    rows = [(n // T // 3, n % T) for n in batch.masked.tolist()]
    assert torch.equal(targets, torch.stack([expected[b, t] for b, t in rows]))


def test_instance_norm_is_over_time_and_ignores_padding() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 20, 5) * 3 + 1
    y = instance_norm(x, None)
    torch.testing.assert_close(y.mean(1), torch.zeros(2, 5), rtol=0, atol=1e-5)
    torch.testing.assert_close(y.var(1, correction=0), torch.ones(2, 5), rtol=1e-4, atol=0)
    valid = torch.ones(2, 20, dtype=torch.bool)
    valid[1, 12:] = False
    z = instance_norm(x, valid)
    torch.testing.assert_close(z[1, :12], instance_norm(x[1:, :12], None)[0], rtol=1e-5, atol=1e-6)
    assert (z[1, 12:] == 0).all()


def test_spread_over_time_ignores_padding() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 20, 5)
    valid = torch.ones(2, 20, dtype=torch.bool)
    valid[1, 12:] = False
    spread = spread_over_time(x, valid)
    torch.testing.assert_close(spread[0], spread_over_time(x[:1], None)[0])
    torch.testing.assert_close(spread[1], spread_over_time(x[1:, :12], None)[0])


def test_losses_against_their_formulas() -> None:
    p, y = torch.tensor([[0.0, 3.0]]), torch.tensor([[1.0, 0.0]])
    l2 = regression_loss(p, y, beta=0.0, scale=None)
    torch.testing.assert_close(l2, torch.tensor(10.0 / 2**0.5))
    smooth = regression_loss(p, y, beta=2.0, scale=1.0)
    torch.testing.assert_close(smooth, torch.tensor(1.0 / 4.0 + (3.0 - 1.0)))


def test_alibi_slopes_and_bias() -> None:
    expected = [2.0**-i for i in range(1, 9)] + [2.0 ** (-i - 0.5) for i in range(4)]
    assert alibi_slopes(12) == pytest.approx(expected)
    alibi = Alibi(4)
    with torch.no_grad():
        alibi.scale.copy_(torch.tensor([1.0, 2.0, -1.0, 0.5]))
    bias = alibi(torch.tensor([[3, 10]]))  # kept tokens keep their original distance
    slopes = torch.tensor(alibi_slopes(4))
    scale = torch.tensor([1.0, 2.0, 0.0, 0.5])  # clamped at 0
    torch.testing.assert_close(bias[0, :, 0, 1], -7 * slopes * scale)
    assert (bias[0, :, [0, 1], [0, 1]] == 0).all()


def test_a_dropped_layer_changes_nothing_and_gets_a_zero_gradient() -> None:
    torch.manual_seed(0)
    trunk = Trunk(TransformerConfig(dim=8, depth=2, heads=2, dropout=0.0), 2, layer_drop=0.999)
    x = torch.randn(1, 4, 8, requires_grad=True)
    y, _ = trunk.train()(x, None)
    assert torch.equal(y, x)
    y.sum().backward()
    gradients = [p.grad for p in trunk.parameters()]
    assert all(g is not None and not g.any() for g in gradients)
    y, _ = trunk.eval()(x, None)
    assert not torch.equal(y, x)


def test_mask_indices_of_a_ragged_batch() -> None:
    drawn = [np.array([[True, False, False], [False, False, True]]), np.array([[True, False]] * 2)]
    found = mask_indices(drawn)
    assert found["visible"].tolist() == [[1, 2], [0, 1], [1, 3], [1, 3]]  # type: ignore[union-attr]
    assert found["masked"].tolist() == [0, 5, 6, 9]  # type: ignore[union-attr]
    assert found["valid"].tolist() == [[True] * 3, [True, True, False]]  # type: ignore[union-attr]
    assert found["ragged"] is True


def test_frames_follow_the_convolutions() -> None:
    from d2v_ds.modalities.speech import PUBLISHED_CONVS

    lengths = {32_000: 99, 160_000: 499, 240_000: 749, 320_000: 999, 399: 0, 400: 1}
    assert {n: frames(n, PUBLISHED_CONVS) for n in lengths} == lengths


def test_positions_that_see_the_whole_crop_are_warned_of() -> None:
    def warnings(*overrides: str) -> list[str]:
        return (
            build_pretrain(recipes.load("speech_tiny", list(overrides)))
            .modalities["speech"]
            .warnings()
        )

    assert warnings() == []
    published = "modality.speech.positions={depth: 5, kernel: 19}"
    assert warnings(published) == []
    [warning] = warnings(published, "modality.speech.crop_seconds=1.005")
    assert "see 91 frames, the whole crop of 50" in warning


@pytest.mark.parametrize(
    ("recipe", "student_size", "teacher_size", "decoder"),
    [
        ("speech_base", 93_783_308, 88_561_932, 619_776),
        ("speech_large", 315_184_144, 308_542_480, 1_908_736),
    ],
)
def test_parameter_counts_are_the_published_ones(
    recipe: str, student_size: int, teacher_size: int, decoder: int
) -> None:
    """Counted in facebookresearch/fairseq at 3d262bb."""
    with torch.device("meta"):
        task = build_pretrain(recipes.load(recipe, []))
    assert sum(p.numel() for p in task.student.parameters()) == student_size
    assert sum(p.numel() for p in task.teacher.parameters()) == teacher_size
    assert sum(p.numel() for p in task.student.predictors.parameters()) == decoder
