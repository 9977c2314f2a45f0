"""Small models of all variants reach the same weights on one process and under ZeRO 2 and 3."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch.distributed as dist

from d2v_ds import seeding
from tests.helpers import variants
from tests.helpers.steps import masked_tokens, prepare, take
from tests.helpers.variants import VARIANTS

STEPS, MICRO_BATCHES = 4, 2
# The gradient of the keys' bias is only rounding error, which Adam amplifies if eps is small.
MORE = ["model.dropout=0.1", "model.layer_drop=0.2", "optim.eps=1e-3"]
BUCKETS = {
    "reduce_bucket_size": 5000,
    "allgather_bucket_size": 5000,
    "stage3_prefetch_bucket_size": 5000,
    "stage3_param_persistence_threshold": 100,
}


def trajectory(variant: str, stage: str) -> tuple[dict[tuple[int, int], float], dict[str, Any]]:
    """This rank's losses by (step, micro-batch), and its pieces of the masters and the EMA."""
    rank, world = dist.get_rank(), dist.get_world_size()
    more = ["model.drop_path=0.2"] if variant == "v1_vision" else []
    config = variants.config(variant, *MORE, *more)
    task = variants.build(variant, *MORE, *more)
    modality = variants.modality_of(task)
    engine, ema = prepare(
        task, config.optim, stage=stage, accumulation=MICRO_BATCHES // world, zero=BUCKETS
    )
    losses = {}
    for step in range(STEPS):
        samples = variants.examples(task, 20 + step, 40, 33, 25)
        batches = [
            modality.collate(
                samples[2 * i : 2 * i + 2], [seeding.generator(step, i, j) for j in range(2)], i
            )
            for i in range(MICRO_BATCHES)
        ]
        share = MICRO_BATCHES // world
        mine = batches[rank * share : (rank + 1) * share]
        found = take(engine, ema, mine, count=masked_tokens(batches), step=step)
        losses |= {(step, b.index): loss for b, loss in zip(mine, found, strict=True)}
    pieces = {f"master/{n}": (s.offset, s.master.clone()) for n, s in engine.partitions().items()}
    pieces |= {f"ema/{n}": (v[0], v[1].clone()) for n, v in ema.values.items()}
    return losses, pieces


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_trains_alike_on_every_engine(
    variant: str, run_ranks: Callable[..., list[Any]]
) -> None:
    [(expected, whole)] = run_ranks(1, trajectory, variant, "local")
    assert expected[STEPS - 1, 0] > 0 and len(set(expected.values())) == len(expected)
    for stage in ("zero2", "zero3"):
        results = run_ranks(2, trajectory, variant, stage)
        losses = {key: value for found, _ in results for key, value in found.items()}
        assert losses == pytest.approx(expected, rel=1e-5), stage
        for _, pieces in results:
            for name, (offset, values) in pieces.items():
                theirs = whole[name][1][offset : offset + len(values)]
                error = float((values - theirs).abs().max()) / (STEPS * 1e-3)
                assert error <= 1e-4, f"{stage}: {name} is off by {error:.1e} of the largest change"
