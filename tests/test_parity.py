"""The speech model under every ZeRO stage against the local engine: the same losses and weights.

Four micro-batches of unequal length a step, two on each of two ranks, dropout and LayerDrop on,
clipping active, the teacher following, twenty steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from d2v_ds import masking, recipes
from d2v_ds.distributed import seed_torch
from d2v_ds.engine import create_engine
from d2v_ds.engine.optimizer import param_groups
from d2v_ds.pretrain import build_pretrain
from d2v_ds.teacher import Ema

STEPS = 20
MICRO_BATCHES = 4
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
    # the keys' bias has no gradient but rounding, which Adam would follow with a small eps
    "optim.eps=1e-3",
    "optim.clip=0.5",
]
# Small, else nothing is ever split and the test shows little.
BUCKETS = {
    "reduce_bucket_size": 5000,
    "allgather_bucket_size": 5000,
    "stage3_prefetch_bucket_size": 5000,
    "stage3_param_persistence_threshold": 100,
}


def trajectory(stage: str, precision: str) -> dict[str, Any]:
    """Trains on this rank -> losses by (step, micro-batch), this rank's masters and averages."""
    rank, world = dist.get_rank(), dist.get_world_size()
    config = recipes.load("speech_tiny", SETTINGS)
    torch.manual_seed(0)
    task = build_pretrain(config).train()
    modality = task.modalities["speech"]
    tracked = task.tracked()
    engine = create_engine(
        task,
        param_groups(task, task.part, set(tracked.values()).__contains__, decay_all=False),
        settings=type(config.engine)(config=stage, precision=precision),  # type: ignore[arg-type]
        optim=config.optim,
        accumulation=MICRO_BATCHES // world,
        device=torch.device("cpu"),
        overrides=None if stage == "local" else {"zero_optimization": BUCKETS},
    )
    ema = Ema(engine, task.teacher, tracked, "teacher.")
    losses: dict[tuple[int, int], float] = {}
    norms = []
    for step in range(STEPS):
        rng = np.random.default_rng(step)
        lengths = rng.integers(6000, 16000, size=(MICRO_BATCHES, 2))
        batches = [
            modality.collate(
                [rng.standard_normal(n).astype(np.float32) for n in pair],
                [masking.generator(step, i, j) for j in range(2)],
                i,
            )
            for i, pair in enumerate(lengths)
        ]
        count = sum(batch.masked.numel() for batch in batches)
        share = MICRO_BATCHES // world
        for batch in batches[rank * share : (rank + 1) * share]:
            seed_torch(0, step, batch.index)
            loss, _ = engine(batch, count)
            engine.backward(loss)
            losses[step, batch.index] = loss.item()
        assert engine.step(1e-3, 0.01, "speech")
        norms.append(float(engine.grad_norm()))
        ema.update(0.9, "speech")
    shards = engine.shards()
    return {
        "losses": losses,
        "norms": norms,
        "masters": {n: (s.offset, s.master.clone()) for n, s in shards.items()},
        "ema": {n: (offset, values.clone()) for n, (offset, values) in ema.values.items()},
        "sizes": {n: p.numel() for n, p in build_pretrain(config).named_parameters()},
    }


def assemble(results: list[dict[str, Any]], kind: str) -> Tensor:
    """All ranks' pieces as one flat vector, in the order of names."""
    sizes = results[0]["sizes"]
    names = sorted({name for result in results for name in result[kind]})
    whole = {name: torch.full((sizes[name],), torch.nan) for name in names}
    for result in results:
        for name, (offset, values) in result[kind].items():
            whole[name][offset : offset + len(values)] = values
    return torch.cat([whole[name] for name in names])


@pytest.fixture(scope="module")
def reference(pool: Any) -> Callable[[str], dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}

    def get(precision: str) -> dict[str, Any]:
        if precision not in found:
            [found[precision]] = pool.run(1, trajectory, "local", precision, timeout=120)
        return found[precision]

    return get


# Largest difference, in units of what twenty steps at a learning rate of 1e-3 can move a weight.
TOLERANCE = {"fp32": 3e-5, "bf16": 0.1}
LOSS_TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", ["zero0", "zero1", "zero2", "zero3"])
def test_every_stage_trains_as_the_local_engine_does(
    stage: str,
    precision: str,
    run_ranks: Callable[..., list[Any]],
    reference: Callable[[str], dict[str, Any]],
) -> None:
    expected = reference(precision)
    results = run_ranks(2, trajectory, stage, precision)
    losses = {key: value for result in results for key, value in result["losses"].items()}
    assert losses.keys() == expected["losses"].keys()
    ours = torch.tensor([losses[key] for key in sorted(losses)])
    theirs = torch.tensor([expected["losses"][key] for key in sorted(losses)])
    torch.testing.assert_close(ours, theirs, rtol=LOSS_TOLERANCE[precision], atol=0)
    for kind in ("masters", "ema"):
        ours, theirs = assemble(results, kind), assemble([expected], kind)
        error = (ours - theirs).abs().max().item() / (STEPS * 1e-3)
        print(f"{stage} {precision} {kind}: {error:.1e}")
        assert error <= TOLERANCE[precision], f"{kind} are off by {error:.1e}"
    norms = [torch.tensor(result["norms"]) for result in (*results, expected)]
    for norm in norms[:-1]:
        torch.testing.assert_close(norm, norms[-1], rtol=LOSS_TOLERANCE[precision], atol=0)
