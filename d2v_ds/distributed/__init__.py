"""Processes of a run: ranks, rendezvous, collectives, stopping and launching.

    world.py          the environment of srun, torchrun or the launcher -> World
    rendezvous.py     how the ranks of a Slurm step find rank 0
    process_group.py  World -> torch.distributed
    collectives.py    small exchanges between ranks, on the host
    signals.py        stop signals before and after training
    stop.py           signals and STOP files -> one agreement on all ranks
    launcher.py       N ranks on this machine, without an external launcher

Depends on torch.distributed, not on training code.
"""
