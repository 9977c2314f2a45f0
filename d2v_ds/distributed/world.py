"""Which rank this process is, according to its launcher.

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
    """This process among all ranks of the run."""

    rank: int = 0
    local_rank: int = 0  # on this machine: the GPU to take
    size: int = 1
    address: str = ""  # host and port where rank 0 listens; empty for a single process
    port: int = 0
    key: str = ""  # of a step that srun started: identifies its ranks to each other

    @staticmethod
    def from_environment(environ: Mapping[str, str] | None = None) -> World:
        """From torchrun's variables (deepspeed and the launcher set them too), otherwise from
        srun's, otherwise a single process. Raises UserError for inconsistent variables."""
        env = os.environ if environ is None else environ
        if "RANK" in env and "WORLD_SIZE" in env:
            rank, local_rank, size = "RANK", "LOCAL_RANK", "WORLD_SIZE"
            address, port, key = "127.0.0.1", 29500, ""
        elif "SLURM_STEP_NUM_TASKS" in env:  # only srun sets it: a batch script is one process
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
            raise UserError(f"{rank}={world.rank} is not in 0 .. {size}={world.size} - 1")
        return world


def _number(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = env.get(name, "" if default is None else str(default))
    if not text.isdecimal():
        raise UserError(f"{name}: expected an integer in the environment, got {text!r}")
    return int(text)


def first_host(nodelist: str) -> str:
    """The first host of Slurm's compressed list: node[003-007,9],other -> node003."""
    first = re.split(r",(?![^\[]*\])", nodelist)[0]
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first)


def port_of(key: str, attempt: int = 0) -> int:
    """A port derived from `key`, below the ephemeral ports."""
    return 20000 + stable_hash(key, attempt) % 10000


def cores_of_rank() -> int:
    """The number of cores of this rank: as assigned by srun, otherwise an equal share."""
    cores = len(os.sched_getaffinity(0))
    if "SLURM_STEP_NUM_TASKS" in os.environ:  # without binding, every rank sees all cores
        return min(cores, int(os.environ.get("SLURM_CPUS_PER_TASK", cores)))
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
