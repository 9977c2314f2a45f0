"""The process group of a single process."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist

from d2v_ds.distributed.collectives import barrier
from d2v_ds.distributed.process_group import init, shutdown
from d2v_ds.distributed.world import World


def test_a_single_process_needs_no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # so that monkeypatch undoes what `init` sets
        monkeypatch.delenv(name)
    barrier()  # nothing to wait for yet
    init(World.from_environment(), torch.device("cpu"))
    try:
        tensor = torch.ones(2)
        dist.all_reduce(tensor)
        barrier()
        assert tensor.tolist() == [1, 1] and os.environ["LOCAL_RANK"] == "0"
    finally:
        shutdown()
    assert "WORLD_SIZE" not in os.environ  # else a later command would expect other ranks
    shutdown()  # a second call does nothing
    assert not dist.is_initialized()
