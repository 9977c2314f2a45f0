"""Invariants of the pre-training objective."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from d2v_ds import recipes, student
from d2v_ds.engine.optimizer import param_groups
from d2v_ds.loss import class_loss, instance_norm, make_targets, regression_loss
from d2v_ds.modalities.speech import PUBLISHED_CONVS, token_count
from d2v_ds.pretrain import Pretrain, at_masked
from d2v_ds.pretrain_report import spread_over_time
from tests.helpers import variants
from tests.helpers.steps import prepare, take
from tests.helpers.variants import RAGGED, VARIANTS, assemble, batch_of, draw, examples

SIZES = (20, 40, 31)  # tokens per sample


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def task(variant: str) -> Pretrain:
    return variants.build(variant)


@pytest.fixture(autouse=True)
def noise_by_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Removes the noise in masked slots, so that results can be compared between batches."""
    monkeypatch.setattr(student, "mask_noise", lambda N, D, std, like: like.new_zeros(N, D))


# ----------------------------------------------------------- padding, order, splits and views


@pytest.mark.parametrize("variant", RAGGED)
def test_padding_changes_nothing(task: Pretrain) -> None:
    """Samples of different lengths give the same results in one batch as alone."""
    samples = examples(task, *SIZES)
    drawn = draw(task, samples)
    together = assemble(task, samples, drawn)
    assert together.valid is not None
    assert together.ragged or together.visible is None
    loss, stats = task(together, 1)
    loss.backward()
    whole = {name: p.grad for name, p in task.student.named_parameters()}
    task.zero_grad()

    alone = [assemble(task, [e], [m]) for e, m in zip(samples, drawn, strict=True)]
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


@pytest.mark.parametrize("variant", RAGGED)
def test_the_content_of_padding_changes_nothing(task: Pretrain) -> None:
    batch = batch_of(task, *SIZES)
    assert batch.valid is not None
    encoder = task.student.encoder
    tokens = encoder.features(batch)
    other = torch.where(batch.valid[:, :, None], tokens, tokens + 7.0)
    for run in (encoder.whole, encoder.views):
        x, y = run(batch, tokens)[0], run(batch, other)[0]
        if x.shape[1] == tokens.shape[1]:  # all tokens, including padding
            rows = batch.valid.repeat_interleave(len(x) // len(batch.valid), 0)
            x, y = x[rows], y[rows]
        elif batch.ragged:
            attended = batch.attended()
            assert attended is not None
            x, y = x[attended], y[attended]
        assert torch.equal(x, y)


def test_the_order_of_samples_changes_nothing(task: Pretrain) -> None:
    samples = examples(task, 20, 40)
    drawn = draw(task, samples)
    first, _ = task(assemble(task, samples, drawn), 1)
    second, _ = task(assemble(task, samples[::-1], drawn[::-1]), 1)
    torch.testing.assert_close(first, second, rtol=1e-5, atol=0)


def test_the_loss_does_not_depend_on_how_a_batch_is_split(task: Pretrain) -> None:
    samples = examples(task, 40, 40, 40, 40)
    drawn = draw(task, samples)
    count = sum(int(m.sum()) for m in drawn)
    whole, _ = task(assemble(task, samples, drawn), count)
    halves = [task(assemble(task, samples[i : i + 2], drawn[i : i + 2]), count)[0] for i in (0, 2)]
    torch.testing.assert_close(whole, halves[0] + halves[1], rtol=1e-5, atol=0)


def test_views_are_independent(variant: str) -> None:
    """One batch of M views equals M batches of one view."""
    modality = {"speech": "speech", "vision": "vision", "text": "text"}[variant[3:]]
    task = variants.build(variant, f"modality.{modality}.views=3")
    samples = examples(task, 40)
    [drawn] = draw(task, samples)
    assert len(drawn) == 3
    whole, _ = task(assemble(task, samples, [drawn]), 1)
    total = torch.zeros(())
    for view in drawn:
        total = total + task(assemble(task, samples, [view[None]]), 1)[0].detach()
    torch.testing.assert_close(whole.detach(), total, rtol=1e-5, atol=0)


# -------------------------------------------------------- inputs of student and teacher


def test_masked_tokens_never_reach_the_student(task: Pretrain) -> None:
    samples = examples(task, 40)
    batch = assemble(task, samples, draw(task, samples))
    encoder = task.student.encoder
    never_seen = ~batch.seen.any(0)  # tokens that are masked in every view
    assert never_seen.any()
    if batch.corrupted is not None:  # the student reads `corrupted`, not `inputs`
        changed = dataclasses.replace(batch, inputs=(batch.inputs + never_seen) % 49)
        for read in (batch, changed):
            assert not (read.corrupted[:, never_seen] != 49).any()  # type: ignore[index]
        tokens = encoder.features(batch)
        first, _ = task.student.predict(batch, tokens)
        second, _ = task.student.predict(changed, encoder.features(changed))
        assert torch.equal(first, second)
        return
    tokens = encoder.features(batch)
    before, extra, _ = encoder.views(batch, tokens)
    changed_tokens = tokens.clone()
    changed_tokens[:, never_seen] += 100.0
    after, extra_after, _ = encoder.views(batch, changed_tokens)
    assert torch.equal(after, before)
    assert extra is None or torch.equal(extra, extra_after)
    assert not torch.equal(encoder.views(batch, tokens + 0.1 * torch.randn_like(tokens))[0], before)


def test_masked_tokens_are_replaced_in_1_0_and_removed_in_2_0(variant: str, task: Pretrain) -> None:
    samples = examples(task, 40, 40)
    batch = assemble(task, samples, draw(task, samples))
    x, _, _ = task.student.encoder.views(batch, task.student.encoder.features(batch))
    if variant.startswith("v2"):
        assert x.shape[1] == int(batch.seen.sum(1).max()) < batch.seen.shape[1]
        visible = batch.visible
        assert visible is not None and (visible.sort(1).values == visible).all()
        seen = torch.zeros_like(batch.seen).scatter(1, visible, True)
        assert torch.equal(seen, batch.seen)
    else:
        assert x.shape[:2] == batch.seen.shape
    if batch.corrupted is None and batch.visible is None:
        front_end = task.student.encoder.front_end(batch.modality)
        tokens = task.student.encoder.features(batch)
        replaced = front_end.mask_token(tokens, batch.seen)  # type: ignore[misc]
        token = front_end.mask_token.embedding[0]  # type: ignore[union-attr]
        assert (replaced[~batch.seen] == token).all()
        assert torch.equal(replaced[batch.seen], tokens[batch.seen])


def test_the_teacher_sees_everything_and_has_no_gradient(task: Pretrain) -> None:
    samples = examples(task, 40, 30)
    drawn = draw(task, samples)
    batch = assemble(task, samples, drawn)
    tokens = task.student.encoder.features(batch)
    layers = task.teacher.layers(task.student.encoder, batch, tokens, 2)
    whole = task.modalities[batch.modality].unmasked(samples)
    expected = task.teacher.layers(
        task.student.encoder, whole, task.student.encoder.features(whole), 2
    )
    for ours, theirs in zip(layers, expected, strict=True):
        assert all(
            torch.equal(a, b) and not a.requires_grad for a, b in zip(ours, theirs, strict=True)
        )
    loss, _ = task(batch, 1)
    loss.backward()
    assert all(p.grad is None for p in task.teacher.parameters())
    without = [n for n, p in task.student.named_parameters() if p.grad is None]
    assert without == []
    assert not task.teacher.training and task.student.training


def test_dropout_does_not_affect_the_teacher(variant: str) -> None:
    """The student's dropout does not reach the teacher, even if they share parts."""
    modality = variant[3:]
    overrides = ["model.dropout=0.5", f"modality.{modality}.prenet_dropout=0.5"]
    if modality == "text":
        overrides += ["modality.text.dropout=0.5", "modality.text.prenet_depth=1"]
        overrides += ["modality.text.shared=[features, context]"]
    task = variants.build(variant, *overrides)
    batch = batch_of(task, 40, 30)
    encoder = task.student.encoder
    first, second = (task.targets(batch, encoder.features(batch)) for _ in range(2))
    assert torch.equal(first, second)
    assert encoder.front_end(modality).context.training  # type: ignore[union-attr]
    predictions = [task.student.predict(batch, encoder.features(batch))[0] for _ in range(2)]
    assert not torch.equal(*predictions)


def test_the_loss_is_over_masked_tokens_without_padding(task: Pretrain) -> None:
    batch = batch_of(task, *SIZES)
    R, T = batch.seen.shape
    valid = torch.ones(R // batch.views, T, dtype=torch.bool)
    if batch.valid is not None:
        valid = batch.valid
    expected = valid.repeat_interleave(batch.views, 0) & ~batch.seen
    assert torch.equal(batch.masked, expected.flatten().nonzero()[:, 0])
    predictions, _ = task.student.predict(batch, task.student.encoder.features(batch))
    assert len(predictions) == len(batch.masked)


def test_the_teacher_of_text_reads_the_whole_text() -> None:
    """fairseq's 1.0 shows the teacher only the masked tokens. Ours reads all tokens, without
    padding between them and with consecutive positions."""
    task = variants.build("v1_text")
    samples = examples(task, 40, 30)
    batch = batch_of(task, 40, 30)
    assert batch.shown is None and batch.corrupted is not None
    for row, sample in zip(batch.inputs, samples, strict=True):
        assert row[: len(sample)].tolist() == sample.tolist()
    features = task.student.encoder.front_end("text").features
    seen: list[Tensor] = []
    hook = features.positions.register_forward_hook(  # type: ignore[union-attr]
        lambda _m, args, _o: seen.append(args[0])
    )
    task.student.encoder.features(batch)
    hook.remove()
    assert seen[0][0].tolist() == list(range(2, 42))
    assert seen[0][1].tolist() == [*range(2, 32), *[1] * 10]


def test_the_teacher_of_text_as_in_fairseq() -> None:
    task = variants.build("v1_text", "compat=fairseq")
    batch = batch_of(task, 40, 30)
    assert batch.shown is not None and torch.equal(
        batch.shown.flatten().nonzero()[:, 0], batch.masked
    )
    assert (batch.inputs[~batch.shown] == 1).all()
    tokens = task.student.encoder.features(batch)
    changed = torch.where(batch.shown[:, :, None], tokens, tokens + 5)
    first, second = (at_masked(task.targets(batch, t), batch) for t in (tokens, changed))
    assert torch.isfinite(first).all() and torch.equal(first, second)


@pytest.mark.parametrize("variant", RAGGED)
def test_padded_statistics_include_padding(variant: str) -> None:
    modality = variant[3:]
    task = variants.build(variant, f"modality.{modality}.padded_statistics=true")
    batch = batch_of(task, 20, 40)
    assert batch.padded and batch.valid is not None
    loss, _ = task(batch, 1)
    loss.backward()
    assert torch.isfinite(loss)
    plain = variants.build(variant)
    with torch.no_grad():
        other = plain(batch_of(plain, 20, 40), 1)[0]
        change = float((other - loss).abs() / loss)
    # 1.0 text has no convolutions and normalises targets per token
    assert change == 0 if variant == "v1_text" else change > 1e-6


# ---------------------------------------------------------------------------------- targets


def test_targets_are_the_outputs_of_the_top_layers(variant: str, task: Pretrain) -> None:
    """Outputs of the FFN before the residual, or of whole blocks (vision 1.0), bit-identical to
    the outputs that hooks record, without the class token."""
    batch = batch_of(task, 40, 40)
    seen: list[Tensor] = []
    block = variant == "v1_vision"
    hooks = [
        (b if block else b.ffn.fc2).register_forward_hook(
            lambda _m, _i, output: seen.append(output[0] if block else output)
        )
        for b in task.teacher.encoder.trunk.blocks
    ]
    targets = task.targets(batch, task.student.encoder.features(batch))
    for hook in hooks:
        hook.remove()
    extra = 1 if "vision" in variant else 0
    expected = make_targets(
        [layer[:, extra:] for layer in seen[-2:]],
        None,
        layer_norm=task.target.layer_norm,
        final_norm=task.target.final_norm,
    )
    assert len(seen) == 3 and torch.equal(targets, expected)
    rows = [(n // targets.shape[1], n % targets.shape[1]) for n in batch.masked.tolist()]
    picked = torch.stack([expected[r // batch.views, t] for r, t in rows])
    assert torch.equal(at_masked(targets, batch), picked)


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


def test_the_spread_of_targets_falls_late_in_a_collapse() -> None:
    """The eps of the instance norm affects only layers that hardly change over time."""
    torch.manual_seed(0)
    expected = {1.0: 1.0, 0.1: 0.9995, 0.01: 0.9525, 0.001: 0.300, 0.0001: 0.032}
    for spread, after in expected.items():
        x = torch.randn(1, 4000, 8) * spread
        x = (x - x.mean(1, keepdim=True)) / x.std(1, correction=0, keepdim=True) * spread
        assert float(instance_norm(x, None).std(1, correction=0).mean()) == pytest.approx(
            after, rel=0.02
        )


def test_spread_over_time_ignores_padding() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 20, 5)
    valid = torch.ones(2, 20, dtype=torch.bool)
    valid[1, 12:] = False
    spread = spread_over_time(x, valid)
    torch.testing.assert_close(spread[0], spread_over_time(x[:1], None)[0])
    torch.testing.assert_close(spread[1], spread_over_time(x[1:, :12], None)[0])


# ----------------------------------------------------------------------------------- losses


def test_losses_against_their_formulas() -> None:
    p, y = torch.tensor([[0.0, 3.0]]), torch.tensor([[1.0, 0.0]])
    l2 = regression_loss(p, y, beta=0.0, scale=None)
    torch.testing.assert_close(l2, torch.tensor(10.0 / 2**0.5))
    smooth = regression_loss(p, y, beta=2.0, scale=1.0)
    torch.testing.assert_close(smooth, torch.tensor(1.0 / 4.0 + (3.0 - 1.0)))


def test_the_class_loss_is_a_mean_over_views() -> None:
    torch.manual_seed(0)
    targets, prediction = torch.randn(2, 5, 4), torch.randn(6, 4)
    masked = torch.full((6,), 3.0)
    expected = (prediction - targets.mean(1).repeat_interleave(3, 0)).square().sum(1).mean() / 2
    total = class_loss(prediction, targets, None, masked)
    torch.testing.assert_close(total / masked.sum(), expected)
    valid = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    total = class_loss(prediction[3:], targets[1:], valid[1:], masked[3:])
    error = prediction[3:] - targets[1, :3].mean(0)
    torch.testing.assert_close(total / 9, error.square().sum(1).mean() / 2)


@torch.no_grad()
def class_share(task: Pretrain, repeats: int) -> tuple[float, float]:
    """The class loss and the patch loss of a batch that repeats the same images."""
    samples = examples(task, *[0] * 2)
    drawn = draw(task, samples)
    batch = assemble(task, samples * repeats, drawn * repeats)
    loss, _ = task(batch, len(batch.masked))
    kept = task.modalities["vision"].config
    without = dataclasses.replace(kept, cls_weight=0.0)
    task.modalities["vision"].config = without  # type: ignore[misc]
    patches, _ = task(batch, len(batch.masked))
    task.modalities["vision"].config = kept  # type: ignore[misc]
    return float(loss - patches), float(patches)


def test_the_class_loss_grows_with_the_batch_only_in_fairseq() -> None:
    task = variants.build("v2_vision")
    assert class_share(task, 2) == pytest.approx(class_share(task, 1), rel=1e-4)
    faithful = variants.build("v2_vision", "compat=fairseq")
    once, twice = class_share(faithful, 1), class_share(faithful, 2)
    assert twice[0] == pytest.approx(2 * once[0], rel=1e-4)
    assert twice[1] == pytest.approx(once[1], rel=1e-4)
    # in fairseq the weight grows with the rows of the batch: 2 images with 3 views each
    fixed = variants.build("v2_vision", "modality.vision.cls_views=6")
    assert class_share(fixed, 1) == pytest.approx(once, rel=1e-4)


def test_the_class_token_bypasses_the_decoder() -> None:
    """The decoder's dropout must not affect the class token's output."""
    extras = []
    for rate in (0.0, 0.5):
        task = variants.build("v2_vision", f"modality.vision.decoder.dropout={rate}")
        batch = batch_of(task, 0, 0)
        extras.append(task.student.predict(batch, task.student.encoder.features(batch))[1])
    assert torch.equal(*extras)


# ----------------------------------------------------------------------- teacher and optimizer


def test_the_teacher_averages_the_same_parts_as_the_original(variant: str, task: Pretrain) -> None:
    """It shares the other parts instead of copying them in every step. All buffers are floats."""
    front_end = task.teacher.encoder.front_end(variant[3:])
    missing = {n for n in ("features", "positions") if getattr(front_end, n) is None}
    shared = {
        "v2_speech": {"features"},
        "v1_speech": {"features", "positions"},
        "v2_text": {"features", "positions"},  # text has no `positions` part
        "v1_text": {"features", "positions"},
        "v2_vision": {"positions"},
        "v1_vision": {"positions"},
    }
    assert missing == shared[variant] and front_end.mask_token is None
    averages = task.averages()
    assert averages.keys() == {n for n, _ in task.named_parameters() if n.startswith("teacher.")}
    for teacher, follows in averages.items():
        assert torch.equal(task.get_parameter(teacher), task.get_parameter(follows))
    assert all(buffer.is_floating_point() for buffer in task.buffers())


def test_at_a_decay_of_one_averages_stay_but_shared_parts_train() -> None:
    task = variants.build("v1_speech")
    engine, ema = prepare(task, variants.config("v1_speech").optim)
    before = {name: p.clone() for name, p in task.named_parameters()}
    batch = batch_of(task, 40, 30)
    targets = task.targets(batch, task.student.encoder.features(batch))
    take(engine, ema, [batch], count=len(batch.masked), lr=1e-2, weight_decay=0.0, decay=1.0)
    changed = {n for n, p in task.named_parameters() if not torch.equal(p, before[n])}
    assert changed and all(name.startswith("student.") for name in changed)
    assert not torch.equal(task.targets(batch, task.student.encoder.features(batch)), targets)


def test_weight_decay_spares_biases_norms_and_scales(variant: str, task: Pretrain) -> None:
    """Compared by name with the parameters that fairseq tags and BEiT lists."""
    averaged = set(task.averages().values())
    groups = param_groups(task, task.part, averaged.__contains__, decay_all=False)
    spared = {name for g in groups if not g.decay for name in g.parameters}
    decayed = {name for g in groups if g.decay for name in g.parameters}
    ending = (".bias", "_bias", ".scale", "extra.embedding")
    norms = {
        f"{name}.weight"
        for name, module in task.named_modules()
        if isinstance(module, nn.LayerNorm)
    }
    assert spared == {n for n in spared | decayed if n.endswith(ending) or n in norms}
    assert "v1" not in variant or variant == "v1_text" or any("mask_token" in n for n in decayed)
    everything = param_groups(task, task.part, averaged.__contains__, decay_all=True)
    assert all(group.decay for group in everything)


# ----------------------------------------------------------------------------------- speech


def test_frames_follow_the_convolutions() -> None:
    lengths = {32_000: 99, 160_000: 499, 240_000: 749, 320_000: 999, 399: 0, 400: 1}
    assert {n: token_count(n, PUBLISHED_CONVS) for n in lengths} == lengths


def test_positions_that_span_the_whole_crop_give_a_warning() -> None:
    def warnings(*overrides: str) -> list[str]:
        return (
            Pretrain.create(recipes.load("speech_tiny", list(overrides)))
            .modalities["speech"]
            .warnings()
        )

    assert warnings() == []
    [warning] = warnings(
        "modality.speech.positions={depth: 5, kernel: 19}", "modality.speech.crop_seconds=1.005"
    )
    assert "cover 91 frames, the whole crop of 50" in warning
