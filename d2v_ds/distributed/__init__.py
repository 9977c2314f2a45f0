"""Processes of a run: who they are, how they meet, agree and stop, and how they are started.

    world.py          the environment of srun, torchrun or the launcher -> World
    rendezvous.py     how the ranks of a Slurm step find rank 0
    process_group.py  World -> torch.distributed
    collectives.py    small exchanges between ranks, on the host
    stop.py           signals and STOP files -> one agreement on all ranks
    launcher.py       N ranks on this machine, without a launcher of the site

Knows torch.distributed and nothing of training.
"""
