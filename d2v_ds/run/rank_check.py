"""Before training, all ranks together: do they fit together, and which node does not?

preflight.examine on every rank, gathered --> preflight.unfit --> the node of each rank, or
UnfitNodes, which the batch script answers by going on without those nodes.
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
    on_all_ranks,
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
    """The node of each rank. Raises UnfitNodes or UserError, on all ranks alike."""
    run, first = RunFolder(config.run_dir), own_rank() == 0
    token = on_all_ranks(lambda: preflight.leave_token(run) if first else None)[0]
    assert token is not None
    right_sum = sums_right(device)
    findings = all_gather(preflight.examine(config, token, right_sum))
    if first:
        token.unlink(missing_ok=True)
    reasons = preflight.unfit(findings)
    if reasons:
        raise preflight.UnfitNodes(reasons)
    return [finding.node for finding in findings]


def report_unfit(error: preflight.UnfitNodes) -> int:
    """Names the nodes, to the batch script as well; the exit code. All ranks together."""
    if own_rank() == 0:
        print(f"d2v-ds: {error}", file=sys.stderr)
        if folder := os.environ.get("D2V_JOB_LOGS"):
            write_atomically(Path(folder, "unfit"), " ".join(error.nodes) + "\n")
    barrier()  # the first rank to end ends all
    return UNFIT


def warn_of_too_few_cores(workers: int) -> None:
    """Says loudly when this rank's loader workers have fewer cores than they need."""
    cores = cores_of_rank()
    if cores < workers + 1:
        log.warning(
            "LOADING DATA WILL BE SLOW: each rank has %d core(s) for itself and %d loader "
            "workers; ask for --cpus-per-task=%d, or set data.workers=%d",
            cores,
            workers,
            workers + 1,
            cores - 1,
        )
