"""Extra tokens and the class loss, which every modality has in both versions of data2vec."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from d2v_ds import student
from d2v_ds.batch import Batch
from d2v_ds.encoder import encoder_of
from d2v_ds.errors import UserError
from d2v_ds.loss import class_loss
from d2v_ds.modalities import create_modalities
from d2v_ds.pretrain import Pretrain, masked_of
from d2v_ds.transformer import Alibi
from tests.helpers import variants
from tests.helpers.steps import prepare, take
from tests.helpers.variants import RAGGED, VARIANTS, assemble, batch_of, draw, examples, tokens_of

SIZES = (20, 40, 31)  # of samples in tokens


@pytest.fixture(autouse=True)
def no_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without noise in the masked slots, results can be compared between batches."""
    monkeypatch.setattr(student, "mask_noise", lambda N, D, std, like: like.new_zeros(N, D))


def build(variant: str, *, tokens: int = 1, weight: float = 1.0, norm: str = "layer") -> Pretrain:
    """norm: the final one, without which most targets would have a mean of zero."""
    under = f"modality.{variant[3:]}"
    return variants.build(
        variant,
        f"{under}.extra_tokens={tokens}",
        f"{under}.cls_weight={weight}",
        f"target.final_norm={norm}",
    )


def class_part(task: Pretrain, batch: Batch) -> Tensor:
    """The class loss of a batch alone, unweighted."""
    tokens = task.student.encoder.features(batch)
    _, extra = task.student.predict(batch, tokens)
    assert extra is not None
    return class_loss(extra[:, -1], task.targets(batch, tokens), batch.valid, masked_of(batch))


def gradients(task: Pretrain) -> dict[str, Tensor]:
    """The gradients of the student, which are cleared."""
    found = {n: p.grad.clone() for n, p in task.student.named_parameters() if p.grad is not None}
    task.zero_grad()
    return found


# --------------------------------------------------------------------------------- training


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_trains_with_a_class_token(variant: str) -> None:
    task, name = build(variant), variant[3:]
    batch = batch_of(task, *SIZES)
    engine, ema = prepare(task, variants.config(variant).optim)
    tokens = [
        part.front_end(name).extra.embedding  # type: ignore[union-attr]
        for part in (task.student.encoder, task.teacher.encoder)
    ]
    before = [token.detach().clone() for token in tokens]
    losses = [
        take(engine, ema, [batch], count=len(batch.masked), step=step)[0] for step in range(3)
    ]
    assert len(set(losses)) == 3 and torch.isfinite(torch.tensor(losses)).all()
    assert all(not torch.equal(*pair) for pair in zip(tokens, before, strict=True))


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_class_loss_reaches_the_token_and_the_encoder(variant: str) -> None:
    task, name = build(variant), variant[3:]
    class_part(task, batch_of(task, *SIZES)).backward()
    found = gradients(task)
    start = f"encoder.front_ends.{name}"
    assert found[f"{start}.extra.embedding"].any()
    assert all(g.any() for n, g in found.items() if n.startswith("encoder.trunk.blocks.0.ffn"))
    assert any(g.any() for n, g in found.items() if n.startswith(f"{start}.features"))
    assert not any(n.startswith("predictors") and g.any() for n, g in found.items())
    assert all(p.grad is None for p in task.teacher.parameters())


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_gradient_of_the_token_does_not_dominate(variant: str) -> None:
    """Clipping by the norm of all gradients would otherwise stop the rest of the model."""
    task = build(variant)
    batch = batch_of(task, *SIZES)
    task(batch, len(batch.masked))[0].backward()
    norms = {name: float(g.norm()) for name, g in gradients(task).items()}
    token = norms.pop(f"encoder.front_ends.{variant[3:]}.extra.embedding")
    assert token < 10 * max(norms.values())


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_loss_is_the_weighted_sum_of_both_parts(variant: str) -> None:
    weighted, without = build(variant, weight=0.5), build(variant, weight=0.0)
    batch = batch_of(weighted, *SIZES)
    with torch.no_grad():
        expected = without(batch, 7)[0] + 0.5 * class_part(weighted, batch) / 7
        torch.testing.assert_close(weighted(batch, 7)[0], expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("variant", ["v2_speech", "v1_speech", "v2_text", "v1_text", "v2_vision"])
def test_the_last_of_several_tokens_is_the_class_token(variant: str) -> None:
    task = build(variant, tokens=2)
    batch = batch_of(task, *SIZES)
    tokens = task.student.encoder.features(batch)
    _, extra = task.student.predict(batch, tokens)
    assert extra is not None and extra.shape == (len(batch.seen), 2, 32)
    class_part(task, batch).backward()
    shape = task.student.encoder.front_end(variant[3:]).extra.embedding.shape  # type: ignore[union-attr]
    assert shape == (2 * 32,)
    assert task.targets(batch, tokens).shape == tokens.shape


@pytest.mark.parametrize("variant", VARIANTS)
def test_probes_get_no_extra_tokens(variant: str) -> None:
    task = build(variant)
    [sample] = examples(task, 30)
    T = tokens_of(variants.modality_of(task), sample)
    for weights in ("student", "teacher"):
        blocks, _ = encoder_of(task, variant[3:], weights)([sample])  # type: ignore[arg-type]
        assert [tuple(block.shape) for block in blocks] == [(1, T, 32)] * 3


@pytest.mark.parametrize("norm", ["none", "instance"])
def test_targets_that_are_normalised_over_tokens_last_have_no_mean(norm: str) -> None:
    """The documented reason why the class loss needs target.final_norm=layer."""

    def mean_of_targets(norm: str) -> float:
        task = build("v2_speech", norm=norm)
        batch = batch_of(task, 40)
        targets = task.targets(batch, task.student.encoder.features(batch))
        return float(targets.mean(1).abs().max())

    assert mean_of_targets(norm) < 1e-5 < 1e-2 < mean_of_targets("layer")


# ---------------------------------------------------------------------------------- padding


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_padded_batch_equals_its_examples(variant: str) -> None:
    """Loss and gradients of the class loss, and the whole loss."""
    task = build(variant)
    samples = examples(task, *SIZES)
    drawn = draw(task, samples)
    together = assemble(task, samples, drawn)
    assert (together.valid is not None) == (variant in RAGGED)
    singles = [assemble(task, [s], [m]) for s, m in zip(samples, drawn, strict=True)]

    whole = class_part(task, together)
    whole.backward()
    ours = gradients(task)
    parts = [class_part(task, single) for single in singles]
    for part in parts:
        part.backward()
    theirs = gradients(task)
    torch.testing.assert_close(whole, torch.stack(parts).sum(), rtol=2e-5, atol=0)
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        close = 5e-5 * float(gradient.abs().max()) + 1e-7
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-3, atol=close, msg=name)

    with torch.no_grad():
        total = torch.stack([task(single, 1)[0] for single in singles]).sum()
        torch.testing.assert_close(task(together, 1)[0], total, rtol=2e-5, atol=0)


@pytest.mark.parametrize("variant", RAGGED)
def test_the_content_of_padding_does_not_reach_the_class_token(variant: str) -> None:
    task = build(variant)
    batch = batch_of(task, *SIZES)
    assert batch.valid is not None
    encoder = task.student.encoder
    tokens = encoder.features(batch)
    other = torch.where(batch.valid[:, :, None], tokens, tokens + 7.0)
    for run in (encoder.whole, encoder.views):
        ours, theirs = run(batch, tokens)[1], run(batch, other)[1]
        assert ours is not None and theirs is not None and torch.equal(ours, theirs)


# --------------------------------------------------------------------------- attention, weight


@pytest.mark.parametrize("view", ["student", "teacher"])
def test_alibi_gives_the_class_token_no_bias(view: str) -> None:
    task = build("v2_speech")
    batch = batch_of(task, *SIZES)
    encoder = task.student.encoder
    alibi = encoder.front_end("speech").bias
    assert isinstance(alibi, Alibi)
    biases: list[Tensor] = []
    encoder.trunk.register_forward_pre_hook(lambda _m, args: biases.append(args[1]))
    tokens = encoder.features(batch)
    if view == "student":
        encoder.views(batch, tokens)
        assert batch.visible is not None
        positions, exists = batch.visible, batch.attended()
    else:
        encoder.whole(batch, tokens)
        positions, exists = torch.arange(tokens.shape[1])[None], batch.valid
    assert exists is not None
    [bias] = biases
    rows = torch.arange(len(bias))[:, None]
    keys = bias.transpose(1, 3)  # [R, key, query, H]
    assert (keys[:, 0] == 0).all(), "attention to the class token has a bias"
    own = bias[:, :, 0, 1:].transpose(1, 2)  # [R, key, H]
    assert (own[exists] == 0).all(), "attention of the class token has a bias"
    assert (own[~exists] == float("-inf")).all() and not exists.all()
    plain = alibi(positions.clamp(max=tokens.shape[1] - 1)).expand(len(rows), -1, -1, -1)
    both = (exists[:, :, None] & exists[:, None, :])[:, None].expand_as(plain)
    assert torch.equal(bias[:, :, 1:, 1:][both], plain[both])


def test_the_weight_of_the_class_loss() -> None:
    def weight(views: int, **settings: object) -> float:
        given = {"extra_tokens": 1} | settings
        [modality] = create_modalities({"speech": given}).values()
        return modality.class_weight(views)

    assert weight(12) == 0
    assert weight(12, cls_weight=0.5) == 0.5
    assert weight(12, cls_weight=0.5, cls_views=8) == 4
    assert weight(12, cls_weight=0.5, cls_views=None) == 6


@pytest.mark.parametrize("name", ["speech", "vision", "text"])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"cls_weight": 1.0, "extra_tokens": 0},
            ": cls_weight=1.0 needs extra_tokens of at least 1",
        ),
        ({"extra_tokens": -1}, ".extra_tokens: must be 0 or more, got -1"),
    ],
)
def test_settings_that_do_not_fit(name: str, settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as caught:
        create_modalities({name: settings})
    assert str(caught.value) == f"modality.{name}{message}"


def test_a_teacher_of_masked_text_has_no_class_loss() -> None:
    """It sees only a part of the text, so its targets have no meaningful mean."""
    settings = {"masked": "replaced", "views": 1, "text_teacher": "masked"}
    create_modalities({"text": settings | {"extra_tokens": 1}})
    with pytest.raises(UserError, match="text_teacher=masked requires cls_weight=0, got 1"):
        create_modalities({"text": settings | {"extra_tokens": 1, "cls_weight": 1}})
