"""ZeRO compared with the local engine and across stages. Functions without `test_` run on ranks."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from d2v_ds.config import EngineSettings, Optim
from d2v_ds.config.decoding import merge
from d2v_ds.engine import create_engine
from d2v_ds.engine.layout import check_layout
from d2v_ds.errors import UserError
from d2v_ds.seeding import seed_torch
from tests.helpers.toy import BUCKETS, CPU, Plan, Toy, Trainer, build, part_of, whole

RunRanks = Callable[..., list[Any]]
STAGES = (0, 1, 2, 3)


def train(plan: Plan) -> dict[str, Any]:
    trainer = Trainer(plan).run()
    return {
        "losses": trainer.losses,
        "norms": trainer.norms,
        "applied": trainer.applied,
        "state": trainer.state(),
    }


def difference(got: dict[str, dict[str, Tensor]], want: dict[str, dict[str, Tensor]]) -> float:
    """Largest difference of masters and moments, relative to each tensor's largest element."""
    assert got.keys() == want.keys()
    differences = [
        (got[n][k] - want[n][k]).abs().max() / want[n][k].abs().max()
        for n in want
        for k in ("master", "exp_avg", "exp_avg_sq")
    ]
    return float(torch.stack(differences).max())  # NaN if any is NaN, unlike Python's max


def assert_parity(
    run_ranks: RunRanks, ranks: int, plan: Plan, *, rtol: float, state_rtol: float
) -> None:
    local = dataclasses.replace(plan, config="local")
    (reference,) = run_ranks(1, train, local)
    results = run_ranks(ranks, train, plan)
    losses = [sum(of_ranks) for of_ranks in zip(*(r["losses"] for r in results), strict=True)]
    assert reference["losses"][-1] < 0.3 * reference["losses"][0], "the reference did not learn"
    assert losses == pytest.approx(reference["losses"], rel=rtol)
    for result in results:
        assert result["applied"] == [True] * plan.steps
        assert result["norms"] == pytest.approx(reference["norms"], rel=2 * rtol)
    states = [r["state"] for r in results]
    if plan.config == "zero0":  # every rank has the full, identical state
        for state in states[1:]:
            assert difference(whole([state]), whole(states[:1])) == 0
    got, want = whole(states), whole([reference["state"]])
    assert difference(got, want) <= state_rtol
    assert {n: v["adam_step"] for n, v in got.items()} == {
        n: v["adam_step"] for n, v in want.items()
    }


# In fp32, only the order of sums differs. In bf16, ZeRO also sums gradients in bf16 over
# micro-batches and ranks, so a weight is sometimes rounded the other way.
TOLERANCE = {"fp32": (5e-7, 3e-6), "bf16": (5e-3, 6e-2)}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", STAGES)
def test_parity_on_two_ranks(run_ranks: RunRanks, stage: int, precision: str) -> None:
    rtol, state_rtol = TOLERANCE[precision]
    plan = Plan(config=f"zero{stage}", precision=precision)
    assert_parity(run_ranks, 2, plan, rtol=rtol, state_rtol=state_rtol)


MORE_RANKS = [
    pytest.param(ranks, stage, precision, marks=[] if keep else [pytest.mark.slow])
    for ranks in (1, 4)
    for stage in STAGES
    for precision in ("fp32", "bf16")
    for keep in [(ranks, stage, precision) in {(4, 3, "bf16"), (1, 2, "bf16")}]
]


@pytest.mark.parametrize(("ranks", "stage", "precision"), MORE_RANKS)
def test_parity_on_more_ranks(run_ranks: RunRanks, ranks: int, stage: int, precision: str) -> None:
    rtol, state_rtol = TOLERANCE[precision]
    plan = Plan(config=f"zero{stage}", precision=precision)
    assert_parity(run_ranks, ranks, plan, rtol=rtol, state_rtol=state_rtol)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", STAGES)
def test_bit_identical_if_nothing_is_summed(
    run_ranks: RunRanks, stage: int, precision: str
) -> None:
    optim = dataclasses.replace(Plan().optim, clip=0.0, adam_eps="fairseq")
    plan = Plan(
        config=f"zero{stage}", precision=precision, micro_batches=1, optim=optim, modalities="aab"
    )
    (local,) = run_ranks(1, train, dataclasses.replace(plan, config="local"))
    (zero,) = run_ranks(1, train, plan)
    assert zero["losses"] == local["losses"]
    assert difference(whole([zero["state"]]), whole([local["state"]])) == 0


def zero_optimization(**settings: Any) -> dict[str, Any]:
    return {"zero_optimization": settings}


CPU_OFFLOAD = {"device": "cpu"}
SWITCHES = [
    (3, zero_optimization(stage3_param_persistence_threshold=100_000)),
    (3, zero_optimization(zero_hpz_partition_size=2)),
]
MORE_SWITCHES = [
    (1, zero_optimization(overlap_comm=True)),
    (2, zero_optimization(overlap_comm=False)),
    (2, zero_optimization(contiguous_gradients=False)),
    (1, zero_optimization(offload_optimizer=CPU_OFFLOAD)),
    (2, zero_optimization(offload_optimizer=CPU_OFFLOAD)),
    (3, zero_optimization(offload_optimizer=CPU_OFFLOAD, offload_param=CPU_OFFLOAD)),
    (3, zero_optimization(sub_group_size=1000)),
    (1, {"data_types": {"grad_accum_dtype": "fp32"}}),
    (2, {"data_types": {"grad_accum_dtype": "fp32"}}),
    (3, {"data_types": {"grad_accum_dtype": "fp32"}}),
]


@pytest.mark.parametrize(
    ("stage", "switch"),
    [*SWITCHES, *(pytest.param(*s, marks=pytest.mark.slow) for s in MORE_SWITCHES)],
)
def test_parity_with_switches(run_ranks: RunRanks, stage: int, switch: dict[str, Any]) -> None:
    precision = "bf16" if "data_types" in switch else "fp32"
    rtol, state_rtol = TOLERANCE[precision]
    plan = Plan(
        config=f"zero{stage}", precision=precision, steps=10, overrides=merge(BUCKETS, switch)
    )
    reference = dataclasses.replace(plan, config="local")
    (local,) = run_ranks(1, train, reference)
    results = run_ranks(2, train, plan)
    losses = [sum(of_ranks) for of_ranks in zip(*(r["losses"] for r in results), strict=True)]
    assert losses == pytest.approx(local["losses"], rel=rtol)
    assert difference(whole([r["state"] for r in results]), whole([local["state"]])) <= state_rtol


# --------------------------------------------------------------------- steps that change nothing


def skip_one(plan: Plan) -> None:
    """If the loss of one micro-batch on one rank is inf, no rank changes its state."""
    trainer = Trainer(plan)
    for step in range(plan.poison):
        assert trainer.step(step)
    state, weights = trainer.state(), trainer.weights()
    ema = {(k, n): v.clone() for k, p in trainer.ema.pieces.items() for n, (_, v) in p.items()}
    assert not trainer.step(plan.poison)
    assert not trainer.engine.grad_norm().isfinite()
    for name, (_, values) in trainer.state().items():
        for key, value in values.items():
            assert torch.equal(value, state[name][1][key]), (name, key)
    for name, weight in trainer.weights().items():
        assert torch.equal(weight, weights[name]), name
    for (kind, name), value in ema.items():
        assert torch.equal(value, trainer.ema.pieces[kind][name][1]), (kind, name)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_non_finite_step_is_skipped_on_all_ranks(
    run_ranks: RunRanks, stage: int, precision: str
) -> None:
    plan = Plan(config=f"zero{stage}", precision=precision, poison=3)
    run_ranks(2, skip_one, plan)
    if precision == "fp32":  # later steps train as on the local engine, which skips it too
        plan = dataclasses.replace(plan, steps=8)
        (local,) = run_ranks(1, train, dataclasses.replace(plan, config="local"))
        results = run_ranks(2, train, plan)
        assert results[0]["applied"] == local["applied"] == [step != 3 for step in range(8)]
        got, want = whole([r["state"] for r in results]), whole([local["state"]])
        assert difference(got, want) <= 3e-6


def idle_parts(plan: Plan) -> None:
    """Asserts that the other modality's weights, moments and Adam steps do not change."""
    trainer = Trainer(plan)
    for step in range(6):
        before, weights = trainer.state(), trainer.weights()
        assert trainer.step(step)
        idle = "b" if plan.modality(step) == "a" else "a"
        moved = set()
        for name, (_, values) in trainer.state().items():
            if part_of(name) == idle:
                for key, value in values.items():
                    assert torch.equal(value, before[name][1][key]), (step, name, key)
            elif not torch.equal(values["master"], before[name][1]["master"]):
                moved.add(part_of(name))
        for name, weight in trainer.weights().items():
            assert part_of(name) != idle or torch.equal(weight, weights[name]), (step, name)
        both: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(both, moved)
        assert set().union(*both) == {"", plan.modality(step)}


@pytest.mark.parametrize(
    ("stage", "precision"),
    [
        *[(stage, "fp32") for stage in STAGES],
        (0, "bf16"),
        pytest.param(1, "bf16", marks=pytest.mark.slow),
        pytest.param(2, "bf16", marks=pytest.mark.slow),
        pytest.param(3, "bf16", marks=pytest.mark.slow),
    ],
)
def test_idle_parts_do_not_change(run_ranks: RunRanks, stage: int, precision: str) -> None:
    run_ranks(2, idle_parts, Plan(config=f"zero{stage}", precision=precision, modalities="aabba"))


# -------------------------------------------------------------------------- between ZeRO stages


def migrate(here: Plan, there: Plan) -> tuple[list[float], list[float]]:
    """Losses of three more steps of `here`, and of `there` with the state of `here`."""
    trainer = Trainer(here)
    for step in range(4):
        trainer.step(step)
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, trainer.state())
    state = whole(parts)
    dist.all_gather_object(parts, trainer.ema.pieces)
    ema: dict[tuple[str, str], dict[int, Tensor]] = {}
    for part in parts:
        for kind, pieces in part.items():
            for name, (offset, value) in pieces.items():
                ema.setdefault((kind, name), {})[offset] = value

    other = Trainer(there)
    for name, partition in other.engine.partitions().items():
        piece = slice(partition.offset, partition.offset + len(partition.master))
        for key in ("master", "exp_avg", "exp_avg_sq"):
            getattr(partition, key).copy_(state[name][key][piece])
        partition.adam_step.copy_(state[name]["adam_step"])
    other.engine.refresh()
    for kind, pieces in other.ema.pieces.items():
        for name, (offset, value) in pieces.items():
            full = torch.cat([v for _, v in sorted(ema[kind, name].items())])
            value.copy_(full[offset : offset + len(value)])
    other.ema.publish()

    losses = []
    for t in (trainer, other):
        t.losses.clear()
        for step in range(4, 7):
            t.step(step)
        total = torch.tensor(t.losses, dtype=torch.float64)
        dist.all_reduce(total)
        losses.append(total.tolist())
    return losses[0], losses[1]


PAIRS = [(a, b) for a in STAGES for b in STAGES]
DEFAULT_PAIRS = {(0, 3), (1, 2), (3, 1), (2, 0), (3, 3)}


@pytest.mark.parametrize(
    ("here", "there"),
    [pytest.param(*p, marks=[] if p in DEFAULT_PAIRS else [pytest.mark.slow]) for p in PAIRS],
)
def test_state_moves_between_stages_bit_exactly(run_ranks: RunRanks, here: int, there: int) -> None:
    # No clipping, because stages sum norms in different orders. One micro-batch per rank, because
    # stages sum micro-batches before (0, 1) or after (2, 3) reducing over ranks.
    optim = dataclasses.replace(Plan().optim, clip=0.0)
    plans = [Plan(config=f"zero{s}", optim=optim, micro_batches=2) for s in (here, there)]
    for stays, moves in run_ranks(2, migrate, *plans):
        assert stays == moves


def test_state_moves_from_fp32_to_bf16(run_ranks: RunRanks) -> None:
    plans = Plan(config="zero2"), Plan(config="zero3", precision="bf16")
    for stays, moves in run_ranks(2, migrate, *plans):
        assert moves == pytest.approx(stays, rel=1e-2) and moves != stays


# ------------------------------------------------------------------------------------ publishing


def publish(plan: Plan) -> None:
    """Asserts that the frozen module holds the given values, rounded, and computes with them."""
    trainer = Trainer(plan)
    dtype = trainer.toy.trunk.norm.weight.dtype
    trainer.step(0)  # after a forward pass, stage 3 may hold gathered copies
    for round_ in range(2):
        g = torch.Generator().manual_seed(round_)
        full = {
            name: torch.randn(p.numel(), generator=g)
            for name, p in build()[0].trunk.named_parameters()
        }
        owned = {n.removeprefix("teacher."): piece for n, piece in trainer.ema.values.items()}
        values = {
            name: (offset, full[name][offset : offset + len(value)])
            for name, (offset, value) in owned.items()
        }
        trainer.engine.publish(trainer.toy.teacher, values)
        reference = copy.deepcopy(build()[0].trunk).to(dtype).eval()
        with torch.no_grad():
            for name, p in reference.named_parameters():
                p.copy_(full[name].view_as(p))
        for name, p in trainer.toy.teacher.named_parameters():
            want = reference.get_parameter(name).detach().view(-1)
            if hasattr(p, "ds_tensor"):
                n = p.ds_tensor.numel()
                mine = want[dist.get_rank() * n : (dist.get_rank() + 1) * n]
                assert torch.equal(p.ds_tensor[: len(mine)], mine), name
            else:
                assert torch.equal(p.detach().view(-1), want), name
        x = torch.randn(2, 6, 24, generator=g).to(dtype)
        with torch.no_grad():
            assert torch.equal(trainer.toy.teacher(x), reference(x))


@pytest.mark.parametrize(
    ("stage", "ranks", "precision", "persistent"),
    [
        (0, 2, "bf16", 0),
        (1, 4, "fp32", 0),
        (1, 2, "bf16", 0),
        (2, 2, "fp32", 0),
        (2, 1, "bf16", 0),
        (3, 2, "fp32", 0),
        (3, 2, "bf16", 100_000),  # all parameters stay gathered
        (3, 4, "fp32", 100),  # some parameters stay gathered
    ],
)
def test_publish_writes_the_values_and_the_forward_pass_uses_them(
    run_ranks: RunRanks, stage: int, ranks: int, precision: str, persistent: int
) -> None:
    overrides = merge(BUCKETS, zero_optimization(stage3_param_persistence_threshold=persistent))
    plan = Plan(config=f"zero{stage}", precision=precision, overrides=overrides)
    run_ranks(ranks, publish, plan)


# ---------------------------------------------------------------------------------- guards, errors


def message_of(call: Callable[[], Any]) -> str:
    try:
        call()
    except (AssertionError, UserError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def zero(toy: Toy, groups: Any, **overrides: Any) -> Any:
    return create_engine(
        toy,
        groups,
        settings=EngineSettings(config="zero2", precision="fp32"),
        optim=Optim(),
        accumulation=2,
        device=CPU,
        overrides=overrides,
    )


def guards() -> dict[str, str]:
    messages = {}
    toy, groups = build()
    engine = zero(toy, groups)
    messages["step"] = message_of(lambda: engine.step(0.1, 0.0, "a"))
    messages["published"] = message_of(
        lambda: engine.publish(toy.teacher, {"norm.weight": (0, torch.ones(3))})
    )
    messages["trainable"] = message_of(lambda: engine.publish(toy.trunk, {}))
    messages["unknown key"] = message_of(
        lambda: zero(*build(), zero_optimization={"overlap_com": True})
    )
    return messages


def test_guards(run_ranks: RunRanks) -> None:
    first, second = run_ranks(2, guards)
    assert first["step"] == "AssertionError: 0 micro-batches before a step of 2"
    assert "norm.weight is not partitioned like any averaged" in first["published"]
    assert "the module is not frozen" in first["trainable"]
    assert first["unknown key"].startswith("UserError: engine.config: rejected by DeepSpeed: ")
    assert "overlap_com" in first["unknown key"] and "\n" not in first["unknown key"]
    assert second == first


def start_apart(stage: int) -> dict[str, tuple[int, Tensor]]:
    toy, groups = build()
    with torch.no_grad():
        for p in toy.parameters():
            p.add_(dist.get_rank())
    settings = EngineSettings(config=f"zero{stage}", precision="bf16")
    engine = create_engine(
        toy, groups, settings=settings, optim=Optim(), accumulation=1, device=CPU
    )
    return {name: (s.offset, s.master.clone()) for name, s in engine.partitions().items()}


@pytest.mark.parametrize("stage", STAGES)
def test_masters_start_from_the_fp32_weights_of_rank_0(run_ranks: RunRanks, stage: int) -> None:
    weights = {name: p.detach().view(-1) for name, p in build()[0].named_parameters()}
    for owned in run_ranks(2, start_apart, stage):
        for name, (offset, master) in owned.items():
            assert torch.equal(master, weights[name][offset : offset + len(master)]), name


def noise() -> float:
    seed_torch(1, 2, 3)
    return torch.rand(()).item()


def test_noise_does_not_depend_on_the_rank(run_ranks: RunRanks) -> None:
    assert len(set(run_ranks(4, noise))) == 1


def test_gaps_and_overlaps_of_partitions_are_detected() -> None:
    whole_, halves = [(0, 6, 0)], [(0, 3, 9), (3, 3, 0)]
    cases: list[tuple[list[Any], bool, str]] = [
        (halves, False, ""),
        ([(3, 3, 0), (0, 3, 9)], False, ""),
        ([(0, 6, 0), (0, 0, 0)], False, ""),
        (whole_ * 2, True, ""),
        (whole_ * 2, False, "w: element 0 has no owner, or several"),
        (halves, True, "w is not whole on every rank"),
        ([(0, 3, 0), (4, 2, 0)], False, "w: element 3 has no owner, or several"),
        ([(0, 3, 0), (3, 2, 0)], False, "w: 5 of 6 elements have an owner"),
    ]
    for pieces, replicated, message in cases:
        layout = torch.tensor([[piece] for piece in pieces])  # [R, 1, 3]
        call = functools.partial(check_layout, layout, {"w": 6}, replicated)
        want = f"AssertionError: {message}" if message else "no error"
        assert message_of(call) == want, pieces
