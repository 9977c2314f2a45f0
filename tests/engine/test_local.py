"""The local engine: updates, precision, skipped steps, publishing and settings."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.nn.utils import clip_grad_norm_

from d2v_ds.config import EngineSettings, Optim
from d2v_ds.config.decoding import merge
from d2v_ds.engine import create_engine, resolve_precision
from d2v_ds.engine.local import LocalEngine
from d2v_ds.errors import UserError
from d2v_ds.seeding import seed_torch
from tests.helpers.toy import CPU, Plan, ToyBatch, Trainer, batches_of, build, part_of


def test_fp32_is_a_plain_torch_loop() -> None:
    plan = Plan(modalities="a", steps=5)
    trainer = Trainer(plan)
    toy, groups = build()
    optimizer = torch.optim.AdamW(
        [{"params": g.parameters.values(), "weight_decay": 0.1 * g.decay} for g in groups],
        betas=plan.optim.betas,
        eps=plan.optim.eps,
        fused=True,
    )
    for step in range(plan.steps):
        trainer.step(step)
        batches = batches_of(step, plan.micro_batches, "a")
        count = sum(b.inputs.shape[0] * b.inputs.shape[1] for b in batches)
        for batch in batches:
            seed_torch(0, step, batch.index)
            toy(batch, count)[0].backward()
        norm = clip_grad_norm_([p for p in toy.parameters() if p.grad is not None], 0.3)
        assert norm.item() == pytest.approx(trainer.norms[-1], rel=1e-6)
        for g in optimizer.param_groups:
            g["lr"] = plan.optim.lr * (1 + step % 3)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for t, s in zip(toy.teacher.parameters(), toy.trunk.parameters(), strict=True):
                t.lerp_(s, 1 - plan.decay)
    for (name, want), got in zip(toy.named_parameters(), trainer.toy.parameters(), strict=True):
        if part_of(name) in ("", "a"):
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)


def test_bf16_keeps_fp32_masters_and_sums_gradients_in_fp32() -> None:
    trainer = Trainer(Plan(precision="bf16", modalities="a"))
    assert {p.dtype for p in trainer.toy.parameters()} == {torch.bfloat16}
    start = build()[0].trunk.conv.weight.detach().view(-1)
    partitions = trainer.engine.partitions()
    assert torch.equal(partitions["trunk.conv.weight"].master, start)  # not rounded to bf16
    trainer.step(0)
    for name, partition in trainer.engine.partitions().items():
        assert (
            partition.master.dtype
            == partition.exp_avg.dtype
            == partition.exp_avg_sq.dtype
            == torch.float32
        )
        weight = trainer.toy.get_parameter(name)
        assert torch.equal(weight.view(-1), partition.master.bfloat16()), name
    assert (partitions["trunk.conv.weight"].master != start).any(), "the view is not live"

    # 256 gradients of 1 and one of 512: a sum in bf16 would lose the ones
    toy, groups = build()
    engine = LocalEngine(toy, groups, precision="bf16", optim=Optim(), device=CPU)
    for scale in [512.0] + 256 * [1.0]:
        engine.backward(toy.head["a"].bias.sum() * scale)
    engine.step(0.0, 0.0, "a")
    assert engine.grad_norm() == pytest.approx((512 + 256) * 24**0.5, rel=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_non_finite_step_changes_nothing(precision: str) -> None:
    trainer = Trainer(Plan(precision=precision, poison=2))
    trainer.step(0)
    trainer.step(1)
    before, weights = trainer.state(), trainer.weights()
    assert not trainer.step(2)
    assert not torch.isfinite(trainer.engine.grad_norm())
    for name, (_, values) in trainer.state().items():
        assert all(torch.equal(v, before[name][1][k]) for k, v in values.items()), name
    assert all(torch.equal(v, weights[n]) for n, v in trainer.weights().items())
    assert trainer.step(3) and trainer.engine.grad_norm().isfinite()


def test_masters_can_be_written() -> None:
    trainer = Trainer(Plan(precision="bf16"))
    name = "head.b.weight"
    trainer.engine.partitions()[name].master.fill_(0.3)
    assert not torch.equal(trainer.toy.head["b"].weight, torch.full((24, 24), 0.3).bfloat16())
    trainer.engine.refresh()
    assert torch.equal(trainer.toy.head["b"].weight, torch.full((24, 24), 0.3).bfloat16())


def test_publish_requires_whole_values() -> None:
    trainer = Trainer(Plan())
    with pytest.raises(AssertionError, match=r"only a part of norm\.weight is given"):
        trainer.engine.publish(trainer.toy.teacher, {"norm.weight": (0, torch.ones(3))})


def test_groups_must_hold_every_parameter_once() -> None:
    toy, groups = build()
    settings = EngineSettings(config="local")
    for wrong in (groups[1:], [*groups, groups[0]]):
        with pytest.raises(AssertionError, match="every trainable parameter exactly once"):
            create_engine(toy, wrong, settings=settings, optim=Optim(), accumulation=1, device=CPU)


def test_unsupported_precision() -> None:
    assert resolve_precision("auto", CPU) == "fp32"
    assert resolve_precision("auto", torch.device("cuda", 0)) == "bf16"
    assert resolve_precision("fp16", torch.device("cuda", 0)) == "fp16"
    with pytest.raises(UserError, match=r"engine\.precision: fp16 needs a GPU; use bf16 or fp32"):
        resolve_precision("fp16", CPU)
    toy, groups = build()
    with pytest.raises(UserError, match=r"engine\.precision: fp16 needs engine\.config=zero1"):
        LocalEngine(toy, groups, precision="fp16", optim=Optim(), device=CPU)


def test_settings_are_merged_by_section() -> None:
    base = {"zero_optimization": {"stage": 2, "overlap_comm": True}, "x": 1}
    merged = merge(base, {"zero_optimization": {"overlap_comm": False}, "x": 2})
    assert merged == {"zero_optimization": {"stage": 2, "overlap_comm": False}, "x": 2}
    assert base["x"] == 1


def test_the_local_engine_needs_no_deepspeed() -> None:
    script = (
        "import sys, d2v_ds.engine.local, d2v_ds.engine.zero; print('deepspeed' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.stdout == "False\n", result.stderr


def test_toy_batches_have_many_shapes() -> None:
    shapes = {tuple(b.inputs.shape) for s in range(5) for b in batches_of(s, 4, "a")}
    assert len(shapes) > 8 and isinstance(batches_of(0, 1, "a")[0], ToyBatch)
