"""All ranks check before training whether they can train together.

preflight.examine on every rank --all-gather--> preflight.unfit --> the node of each rank, or
UnfitNodes, after which the batch script requeues the job without these nodes
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

import torch

from d2v_ds.config import Config
from d2v_ds.distributed.collectives import (
    all_gather,
    barrier,
    on_rank_0,
    own_rank,
    sums_right,
)
from d2v_ds.distributed.world import cores_of_rank
from d2v_ds.exit_codes import UNFIT
from d2v_ds.files import write_atomically
from d2v_ds.run import preflight
from d2v_ds.run.run_folder import RunFolder

log = logging.getLogger("d2v_ds")


def check_ranks(config: Config, device: torch.device) -> list[str]:
    """The node of each rank. Raises UnfitNodes or UserError on all ranks."""
    run = RunFolder(config.run_dir)
    token = on_rank_0(lambda: preflight.leave_token(run))
    findings = all_gather(preflight.examine(config, token, sums_right(device)))
    if own_rank() == 0:
        token.unlink(missing_ok=True)
    reasons = preflight.unfit(findings)
    if reasons:
        raise preflight.UnfitNodes(reasons)
    return [finding.node for finding in findings]


def report_unfit(error: preflight.UnfitNodes) -> int:
    """Reports the nodes to the user and the batch script; returns the exit code. Collective."""
    if own_rank() == 0:
        print(f"d2v-ds: {error}", file=sys.stderr)
        if folder := os.environ.get("D2V_JOB_LOGS"):
            write_atomically(Path(folder, "unfit"), " ".join(error.nodes) + "\n")
    barrier()  # the first rank to exit ends the others
    return UNFIT


def warn_of_too_few_cores(workers: int) -> None:
    """Warns if this rank's loader workers have fewer cores than they need."""
    cores = cores_of_rank()
    if cores < workers + 1:
        log.warning(
            "LOADING DATA WILL BE SLOW: each rank has %d core(s) and %d loader workers; request "
            "--cpus-per-task=%d, or set data.workers=%d",
            cores,
            workers,
            workers + 1,
            cores - 1,
        )
