"""The ranks of a run, from the environment of a launcher."""

from __future__ import annotations

import pytest

from d2v_ds.distributed.world import World, first_host
from d2v_ds.errors import UserError


def test_world_of_a_single_process() -> None:
    assert World.from_environment({}) == World(rank=0, local_rank=0, size=1)
    # a batch script also has these variables but is a single process
    assert World.from_environment({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}).size == 1


def test_torchrun_takes_precedence_over_slurm() -> None:
    env = {
        "RANK": "5",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "8",
        "MASTER_ADDR": "node1",
        "MASTER_PORT": "1234",
        "SLURM_PROCID": "2",
        "SLURM_STEP_NUM_TASKS": "4",
    }
    assert World.from_environment(env) == World(5, 1, 8, "node1", 1234)


def test_world_of_srun() -> None:
    env = {
        "SLURM_PROCID": "3",
        "SLURM_LOCALID": "1",
        "SLURM_NTASKS": "4",
        "SLURM_STEP_NUM_TASKS": "4",
        "SLURM_STEP_NODELIST": "gpu[003-004]",
        "SLURM_JOB_ID": "77",
        "SLURM_STEP_ID": "0",
    }
    world = World.from_environment(env)
    assert (world.rank, world.local_rank, world.size, world.address) == (3, 1, 4, "gpu003")
    assert 20000 <= world.port < 30000
    assert world.port == World.from_environment({**env, "SLURM_PROCID": "0"}).port
    assert world.port != World.from_environment({**env, "SLURM_STEP_ID": "1"}).port
    own = World.from_environment({**env, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "9"})
    assert (own.address, own.port) == ("10.0.0.1", 9)


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"RANK": "x", "WORLD_SIZE": "2"}, r"RANK: expected an integer .*'x'"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, r"RANK=2 is not in 0 \.\. WORLD_SIZE=2 - 1"),
        ({"SLURM_STEP_NUM_TASKS": "2"}, r"SLURM_PROCID: expected an integer .*''"),
    ],
)
def test_an_inconsistent_environment(env: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        World.from_environment(env)


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("node[003-007,9],other", "node003"),
        ("node[9,3-4]", "node9"),
        ("rack[1-2]n[04-05]-ib", "rack1n04-ib"),
        ("a-b1,c[1-2]", "a-b1"),
    ],
)
def test_first_host(nodelist: str, host: str) -> None:
    assert first_host(nodelist) == host
