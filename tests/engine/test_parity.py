"""The speech model has the same losses and weights under every ZeRO stage as on the local engine.

Eight steps with one or four micro-batches of unequal length per rank, dropout, LayerDrop, clipping
and a teacher.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from d2v_ds import recipes, seeding
from d2v_ds.pretrain import Pretrain
from tests.helpers.steps import masked_tokens, prepare, take

STEPS = 8
SETTINGS = [
    "model.dim=32",
    "model.depth=3",
    "model.dropout=0.1",
    "model.attention_dropout=0.1",
    "model.layer_drop=0.2",
    "target.top_k=2",
    "modality.speech.views=2",
    "modality.speech.convs="
    "[[8, 10, 5], [8, 3, 2], [8, 3, 2], [16, 3, 2], [16, 3, 2], [16, 2, 2], [16, 2, 2]]",
    "modality.speech.positions.groups=4",
    "modality.speech.prenet_depth=1",
    "modality.speech.prenet_dropout=0.1",
    "modality.speech.decoder={dim: 16, depth: 2, kernel: 5, groups: 4, dropout: 0.1}",
    # the gradient of the keys' bias is only rounding error, which Adam amplifies if eps is small
    "optim.eps=1e-3",
    "optim.clip=0.5",
]
# Small, because otherwise no bucket would ever be split.
BUCKETS = {
    "reduce_bucket_size": 5000,
    "allgather_bucket_size": 5000,
    "stage3_prefetch_bucket_size": 5000,
    "stage3_param_persistence_threshold": 0,
}
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
SWITCHES: dict[str, list[dict[str, Any]]] = {
    "local": [{}],
    "zero0": [{}],
    "zero1": [{}, OFFLOAD],
    "zero2": [{}, OFFLOAD],
    "zero3": [
        {},
        {**OFFLOAD, "offload_param": {"device": "cpu"}},
        {"stage3_param_persistence_threshold": 1000},  # some parameters stay gathered
    ],
}


@dataclass(frozen=True)
class Case:
    stage: str
    precision: str
    ranks: int
    share: int  # micro-batches per rank
    checkpoint_activations: bool
    switch: int  # index in SWITCHES[stage]

    def __str__(self) -> str:
        return "-".join(map(str, astuple(self)))


CASES = [
    Case(stage, *rest, switch)
    for stage in ("zero0", "zero1", "zero2", "zero3")
    for *rest, switch in itertools.product(
        ("fp32", "bf16"), (1, 2, 4), (1, 4), (False, True), range(len(SWITCHES[stage]))
    )
]


def pairs(case: Case) -> set[Any]:
    """All pairs of settings of a case, and its switch."""
    settings = list(enumerate(astuple(case)[:-1]))
    return {*itertools.combinations(settings, 2), (case.stage, case.switch)}


def pairwise(cases: list[Case]) -> list[Case]:
    """A small subset of the cases that covers all pairs of settings."""
    missing = set().union(*map(pairs, cases))
    chosen = []
    while missing:
        best = max(cases, key=lambda case: len(pairs(case) & missing))
        chosen.append(best)
        missing -= pairs(best)
    return chosen


def trajectory(case: Case) -> dict[str, Any]:
    """Trains on this rank -> losses by (step, micro-batch), this rank's masters and EMA."""
    rank, number = dist.get_rank(), case.ranks * case.share
    again = f"model.checkpoint_activations={str(case.checkpoint_activations).lower()}"
    config = recipes.load("speech_tiny", [*SETTINGS, again])
    torch.manual_seed(0)
    task = Pretrain.create(config).train()
    modality = task.modalities["speech"]
    engine, ema = prepare(
        task,
        config.optim,
        stage=case.stage,
        precision=case.precision,
        accumulation=number // dist.get_world_size(),
        zero={**BUCKETS, **SWITCHES[case.stage][case.switch]} if case.stage != "local" else None,
    )
    losses: dict[tuple[int, int], float] = {}
    norms = []
    for step in range(STEPS):
        rng = np.random.default_rng(step)
        lengths = rng.integers(4000, 10000, size=(number, 2))
        batches = [
            modality.collate(
                [rng.standard_normal(n).astype(np.float32) for n in pair],
                [seeding.generator(step, i, j) for j in range(2)],
                i,
            )
            for i, pair in enumerate(lengths)
        ]
        share = number // dist.get_world_size()
        mine = batches[rank * share : (rank + 1) * share]
        found = take(engine, ema, mine, count=masked_tokens(batches), step=step)
        losses |= {(step, b.index): loss for b, loss in zip(mine, found, strict=True)}
        norms.append(float(engine.grad_norm()))
    partitions = engine.partitions()
    return {
        "losses": losses,
        "norms": norms,
        "masters": {n: (s.offset, s.master.clone()) for n, s in partitions.items()},
        "ema": {n: (offset, values.clone()) for n, (offset, values) in ema.values.items()},
        "sizes": {n: p.numel() for n, p in Pretrain.create(config).named_parameters()},
    }


def assemble(results: list[dict[str, Any]], kind: str) -> Tensor:
    """All ranks' pieces as one flat vector, ordered by name."""
    sizes = results[0]["sizes"]
    names = sorted({name for result in results for name in result[kind]})
    whole = {name: torch.full((sizes[name],), torch.nan) for name in names}
    for result in results:
        for name, (offset, values) in result[kind].items():
            whole[name][offset : offset + len(values)] = values
    return torch.cat([whole[name] for name in names])


@pytest.fixture(scope="module")
def reference(pool: Any) -> Callable[[Case], dict[str, Any]]:
    """The trajectory of the local engine, with all micro-batches on one rank."""
    found: dict[tuple[str, int], dict[str, Any]] = {}

    def get(case: Case) -> dict[str, Any]:
        key = case.precision, case.ranks * case.share
        if key not in found:
            local = Case("local", case.precision, 1, key[1], False, 0)
            [found[key]] = pool.run(1, trajectory, local, timeout=120)
        return found[key]

    return get


# Largest difference, relative to how far all steps can move a weight: steps times lr 1e-3.
TOLERANCE = {"fp32": 3e-5, "bf16": 0.1}
LOSS_TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}
FEW = pairwise(CASES)


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, id=str(c), marks=[] if c in FEW else [pytest.mark.slow]) for c in CASES],
)
def test_every_stage_trains_like_the_local_engine(
    case: Case,
    run_ranks: Callable[..., list[Any]],
    reference: Callable[[Case], dict[str, Any]],
) -> None:
    expected = reference(case)
    results = run_ranks(case.ranks, trajectory, case)
    losses = {key: value for result in results for key, value in result["losses"].items()}
    assert losses.keys() == expected["losses"].keys()
    ours = torch.tensor([losses[key] for key in sorted(losses)])
    theirs = torch.tensor([expected["losses"][key] for key in sorted(losses)])
    rtol = LOSS_TOLERANCE[case.precision]
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=0)
    for kind in ("masters", "ema"):
        ours, theirs = assemble(results, kind), assemble([expected], kind)
        error = (ours - theirs).abs().max().item() / (STEPS * 1e-3)
        print(f"{case} {kind}: {error:.1e}")
        assert error <= TOLERANCE[case.precision], f"{kind} differ by {error:.1e}"
    norms = [torch.tensor(result["norms"]) for result in (*results, expected)]
    for norm in norms[:-1]:
        torch.testing.assert_close(norm, norms[-1], rtol=rtol, atol=0)
