"""What can be checked about a run before it trains.

`check`: of settings, before torch is imported; most mistakes answer in a moment. `examine` on every
rank, then `unfit` on all that they found: whether the ranks fit together, and which node does not.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from d2v_ds.config import Config, modality_of
from d2v_ds.config.decoding import dump_yaml
from d2v_ds.config.engine_file import load_engine_config
from d2v_ds.config.validation import require_divisible, require_one_each
from d2v_ds.errors import UserError
from d2v_ds.loader.find_set import find_set, require_tars, stream_tars
from d2v_ds.run.environment import code_hash, node_name
from d2v_ds.run.run_folder import RunFolder

MIN_FREE = 200e6  # bytes of the run's disk: logs and curves; a checkpoint looks for itself


def check(config: Config, ranks: int) -> None:
    """Raises UserError for settings, shard sets, ranks and run folders that do not fit together."""
    require_divisible(config.batch.micro_batches, ranks)
    load_engine_config(config.engine.config)
    if config.engine.config == "local" and ranks > 1:
        raise UserError(
            f"engine.config: local runs on one rank, this run has {ranks}; use zero0 .. zero3"
        )
    if not config.modality:
        raise UserError("modality: a run needs at least one, for example modality.speech")
    require_one_each(config)
    for name in config.modality:
        require_shards(config, name, ranks)
    run = RunFolder(config.run_dir)
    if run.stop.exists():
        raise UserError(f"{run.stop} asks this run to stop; remove it to go on")
    if run.root.exists() and not run.root.is_dir():
        raise UserError(f"run.dir: {run.root} is a file, not a folder")


def require_shards(config: Config, modality: str, ranks: int) -> None:
    """Raises UserError unless sound shard sets of the modality are named."""
    sources = {s: path for s, path in config.sources.items() if modality_of(s) == modality}
    setting = "data.shards" if len(config.modality) == 1 else f"data.shards.{modality}"
    if not all(sources.values()) or not config.sources:
        raise UserError(
            f"{setting}: must name a shard set, for example {setting}=/data/{modality}; "
            "`d2v-shards --help` tells how to make one"
        )
    if not sources:
        raise UserError(f"{setting}: must be given (has: {', '.join(sorted(config.sources))})")
    for path in sources.values():
        if tars := stream_tars(path):
            require_tars(tars, ranks)
        else:
            find_set(path, modality)


# ------------------------------------------------------------------------------ across the ranks


class UnfitNodes(RuntimeError):
    """Nodes that this run should go without."""

    def __init__(self, reasons: dict[str, str]) -> None:
        super().__init__("; ".join(f"node {node}: {reason}" for node, reason in reasons.items()))
        self.nodes = list(reasons)


@dataclass(frozen=True)
class Finding:
    """Of one rank."""

    node: str
    code: str
    config: str
    sees_run: bool
    free: int  # bytes, where the run folder lies
    right_sum: bool


def leave_token(run: RunFolder) -> Path:
    """A file in the run folder that every rank must see; rank 0 removes it afterwards."""
    run.root.mkdir(parents=True, exist_ok=True)
    token = run.root / f".preflight.{node_name()}.{os.getpid()}"
    token.touch()
    return token


def examine(config: Config, token: Path, right_sum: bool) -> Finding:
    """What this rank finds. right_sum: whether a sum over all ranks was right."""
    sees_run = token.exists()
    return Finding(
        node=node_name(),
        code=code_hash(),
        config=hashlib.sha256(dump_yaml(config).encode()).hexdigest()[:16],
        sees_run=sees_run,
        free=shutil.disk_usage(token.parent).free if sees_run else 0,
        right_sum=right_sum,
    )


def unfit(findings: Sequence[Finding]) -> dict[str, str]:
    """{node: what is wrong with it}; empty when all is well.

    Raises UserError for what no other node would mend: a full disk, sums that are wrong everywhere,
    code or settings of which no version is more common than the others.
    """
    reasons: dict[str, str] = {}
    for finding in findings:
        if not finding.sees_run:
            reasons[finding.node] = "does not see the run folder"
    seeing = [f for f in findings if f.sees_run]
    if seeing and (free := min(f.free for f in seeing)) < MIN_FREE:
        raise UserError(f"run.dir: {free / 1e6:.0f} MB are free on its disk; free some space")
    for key, what in (("code", "other code"), ("config", "other settings")):
        counts = Counter(getattr(finding, key) for finding in findings).most_common()
        if len(counts) > 1 and counts[0][1] == counts[1][1]:
            groups = {
                value: {f.node for f in findings if getattr(f, key) == value} for value, _ in counts
            }
            shown = " / ".join(", ".join(sorted(nodes)) for nodes in groups.values())
            raise UserError(f"the ranks have {what}: {shown}; start all from the same files")
        for finding in findings:
            if getattr(finding, key) != counts[0][0]:
                reasons.setdefault(finding.node, f"has {what} than most")
    wrong = [finding.node for finding in findings if not finding.right_sum]
    if len(wrong) == len(findings) > 1:
        raise UserError(
            "an all-reduce over the ranks is wrong, or does not end, on every node; look at the "
            "network (NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME; NCCL_DEBUG=INFO says more)"
        )
    for node in wrong:
        reasons.setdefault(node, "its all-reduce over the ranks is wrong, or does not end")
    return reasons
