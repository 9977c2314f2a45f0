"""The process group of a run: World -> torch.distributed."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore

from d2v_ds.distributed.rendezvous import meet
from d2v_ds.distributed.world import World

VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_before: dict[str, str | None] = {}  # the environment before `init`


def init(world: World, device: torch.device) -> None:
    """Joins the process group of all ranks: gloo for tensors on the host, NCCL for tensors on a
    GPU. A single process needs neither a launcher nor a network."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    _before.update({name: os.environ.get(name) for name in VARIABLES})
    # DeepSpeed and other libraries read these
    os.environ.update(
        RANK=str(world.rank), LOCAL_RANK=str(world.local_rank), WORLD_SIZE=str(world.size)
    )
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if world.size == 1:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
        return
    os.environ.update(MASTER_ADDR=world.address, MASTER_PORT=str(world.port))
    store = PrefixStore("ranks", meet(world)) if world.key else None  # None: the launcher's own
    dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size)


def shutdown() -> None:
    """Leaves the process group, if there is one, and restores the environment."""
    if dist.is_initialized():
        dist.destroy_process_group()
    while _before:
        name, value = _before.popitem()
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
