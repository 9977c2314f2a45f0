"""Who this process is among those of the run, as its launcher says.

environment (srun, torchrun, launcher.py, or nothing) -> World
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from d2v_ds.errors import UserError
from d2v_ds.seeding import stable_hash


@dataclass(frozen=True)
class World:
    """This process among those of the run."""

    rank: int = 0
    local_rank: int = 0  # on this machine: the GPU to take
    size: int = 1
    address: str = ""  # host and port where rank 0 listens; empty for a single process
    port: int = 0
    key: str = ""  # of a step that srun started: what its ranks know each other by

    @staticmethod
    def from_environment(environ: Mapping[str, str] | None = None) -> World:
        """From torchrun's variables (`launch` and deepspeed set the same), else from srun's, else
        alone. Raises UserError for variables that do not make sense together."""
        env = os.environ if environ is None else environ
        if "RANK" in env and "WORLD_SIZE" in env:
            rank, local_rank, size = "RANK", "LOCAL_RANK", "WORLD_SIZE"
            address, port, key = "127.0.0.1", 29500, ""
        elif "SLURM_STEP_NUM_TASKS" in env:  # set by srun alone: a batch script is one process
            rank, local_rank, size = "SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS"
            address = first_host(env.get("SLURM_STEP_NODELIST", "127.0.0.1"))
            names = ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_STEP_ID")
            key = ".".join(env.get(name, "0") for name in names)
            port = port_of(key)
        else:
            return World()
        world = World(
            rank=_number(env, rank),
            local_rank=_number(env, local_rank, 0),
            size=_number(env, size),
            address=env.get("MASTER_ADDR", address),
            port=_number(env, "MASTER_PORT", port),
            key=key,
        )
        if not 0 <= world.rank < world.size:
            raise UserError(f"{rank}={world.rank} does not lie in 0 .. {size}={world.size} - 1")
        return world


def _number(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = env.get(name, "" if default is None else str(default))
    if not text.isdecimal():
        raise UserError(f"{name}: expected a whole number in the environment, got {text!r}")
    return int(text)


def first_host(nodelist: str) -> str:
    """The first host of Slurm's compressed list: node[003-007,9],other -> node003."""
    first = re.split(r",(?![^\[]*\])", nodelist)[0]
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first)


def port_of(key: str, attempt: int = 0) -> int:
    """A port for the holder of `key`, below those that systems hand out by themselves."""
    return 20000 + stable_hash(key, attempt) % 10000


def cores_of_rank() -> int:
    """Cores that this rank has for itself: what srun gave, else its share of this machine's."""
    cores = len(os.sched_getaffinity(0))
    if "SLURM_STEP_NUM_TASKS" in os.environ:  # where srun binds nobody, all see all cores
        return min(cores, int(os.environ.get("SLURM_CPUS_PER_TASK", cores)))
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
