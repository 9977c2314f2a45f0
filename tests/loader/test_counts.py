"""Random numbers of masked tokens: the ranks sum theirs at each step, and agree."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from d2v_ds.batch import Batch
from d2v_ds.data.shard_format import ShardSet, open_set
from d2v_ds.loader.loader import Loader
from tests.helpers.sensor import Sensor, SensorConfig
from tests.helpers.series import write_set

STEPS = 8
LENGTHS = [[20 + 37 * i % 200 for i in range(n)] for n in (30, 25)]


class Drawn(Sensor):
    """Drops some of the masked tokens of every sample at random."""

    def masked_tokens(self, length: int) -> None:  # type: ignore[override]
        return None

    def collate(self, examples: Any, rngs: Any, index: int) -> Batch:
        batch = super().collate(examples, rngs, index)
        left = torch.from_numpy(rngs[0].random(len(batch.masked)) < 0.8)
        object.__setattr__(batch, "masked", batch.masked[left])
        return batch


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return write_set(tmp_path_factory.mktemp("sets") / "series", LENGTHS)


def counts(root: Path, workers: int, cursor: dict[str, int] | None = None) -> list[Any]:
    """(masked tokens of the step, of this rank's micro-batches, cursor) of each step."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    loader = Loader(
        open_set(root, "series"),
        Drawn(SensorConfig()),  # type: ignore[arg-type]
        seed=3,
        size=1600,
        micro_batches=4,
        rank=rank,
        world=world,
        workers=workers,
        cursor=cursor,
    )
    with closing(loader):
        found = []
        for step in islice(loader, STEPS):
            own = [len(batch.masked) for batch in step.micro_batches]
            assert loader.cursor == step.cursor
            found.append((step.count, own, step.cursor))
        return found


def test_a_step_counts_the_masked_tokens_of_all_ranks(
    shards: ShardSet, run_ranks: Callable[..., list[Any]]
) -> None:
    alone = counts(shards.root, 0)
    assert all(count == sum(own) for count, own, _ in alone)
    assert len({count for count, _, _ in alone}) > 1
    assert counts(shards.root, 1) == alone
    first, second = run_ranks(2, counts, shards.root, 0)
    for (count, own, cursor), a, b in zip(alone, first, second, strict=True):
        assert a[0] == b[0] == count and a[1] + b[1] == own
        assert a[2] == b[2] == cursor


def test_resuming_after_a_step_that_was_counted_in_advance(
    shards: ShardSet, run_ranks: Callable[..., list[Any]]
) -> None:
    whole = counts(shards.root, 0)
    resumed = counts(shards.root, 0, whole[2][2])
    assert resumed[: STEPS - 3] == whole[3:]
    first, _ = run_ranks(2, counts, shards.root, 0, whole[2][2])
    assert [count for count, _, _ in first[: STEPS - 3]] == [count for count, _, _ in whole[3:]]
