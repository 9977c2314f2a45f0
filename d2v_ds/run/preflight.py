"""Checks before training.

`check` examines the settings without importing torch, so that most errors are reported immediately.
`examine` runs on every rank, then `unfit` compares all findings: whether the ranks can train
together, and which node cannot take part.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from d2v_ds.config import Config, modality_of
from d2v_ds.config.config import require_divisible, require_one_each
from d2v_ds.config.decoding import dump_yaml
from d2v_ds.config.engine_file import load_engine_config
from d2v_ds.errors import UserError
from d2v_ds.loader.find_set import find_set, require_tars, stream_tars
from d2v_ds.run.environment import code_hash, node_name
from d2v_ds.run.run_folder import RunFolder
from d2v_ds.secrets import MASK

MIN_FREE = 200e6  # bytes on the run's disk, for logs and metrics; checkpoints check for themselves


def check(config: Config, ranks: int) -> None:
    """Raises UserError if settings, shard sets, ranks and run folder are not consistent."""
    require_secrets(config)
    require_divisible(config.batch.micro_batches, ranks)
    load_engine_config(config.engine.config)
    if config.engine.config == "local" and ranks > 1:
        raise UserError(
            f"engine.config: local runs on one rank, but this run has {ranks}; use zero0 .. zero3"
        )
    if not config.modality:
        raise UserError("modality: a run needs at least one, for example modality.speech")
    require_one_each(config)
    for name in config.modality:
        require_shards(config, name, ranks)
    run = RunFolder(config.run_dir)
    require_writable(run.root)
    if config.init and not run.steps():
        require_init(config.init)
    if run.stop.exists():
        raise UserError(f"{run.stop}: this file stops the run; remove it to resume")


def require_secrets(config: Config) -> None:
    """Raises UserError if a setting that is used has *** in place of a secret, as config.yaml has
    it."""
    data, probe = config.data, config.probe
    for name, given in (
        ("data.shards", data.shards),
        ("data.valid", data.valid),
        ("probe.train", probe.train),
        ("probe.test", probe.test),
        ("init", config.init),
    ):
        values = given if isinstance(given, dict) else {"": given}
        for source, value in values.items():
            if MASK in value:
                key = f"{name}.{source}" if source else name
                raise UserError(
                    f"{key}: {value!r} has {MASK} in place of a secret, because secrets are not "
                    f"stored; give the value again: {key}=..., best as a `pipe:` command that "
                    "reads it from an environment variable, such as $TOKEN"
                )


def require_writable(folder: Path) -> None:
    """Raises UserError unless files can be created in the run folder or, if there is none yet, in
    the nearest folder above it that exists."""
    try:
        for near in (folder, *folder.absolute().parents):
            if near.is_dir():
                with tempfile.TemporaryFile(dir=near):
                    return
            if near.exists() or near.is_symlink():
                what = "is a link to nothing" if near.is_symlink() else "is a file, not a folder"
                raise UserError(f"run.dir: {near} {what}; choose another folder")
    except OSError as error:
        raise unwritable(folder, error) from None


def unwritable(folder: Path, error: OSError) -> UserError:
    return UserError(
        f"run.dir: {folder} cannot be written ({error.strerror or error}); choose another folder, "
        "or change its permissions"
    )


def require_init(init: str) -> None:
    """Raises UserError unless there is something to start from. A run that resumes does not read
    it again."""
    try:
        Path(init).stat()
    except OSError as error:
        absent = isinstance(error, FileNotFoundError | NotADirectoryError)
        reason = "no such file or folder" if absent else error.strerror
        raise UserError(
            f"init: {init}: {reason}; name a run folder, a checkpoint, an exported "
            "folder, a Hugging Face folder, or a .pt or .pth file"
        ) from None


def require_shards(config: Config, modality: str, ranks: int) -> None:
    """Raises UserError unless data.shards names valid shard sets for the modality."""
    sources = {s: path for s, path in config.sources.items() if modality_of(s) == modality}
    setting = "data.shards" if len(config.modality) == 1 else f"data.shards.{modality}"
    if not all(sources.values()) or not config.sources:
        raise UserError(
            f"{setting}: must name a shard set, for example {setting}=/data/{modality}; "
            "`d2v-shards --help` explains how to make one"
        )
    if not sources:
        raise UserError(f"{setting}: must be given (given: {', '.join(sorted(config.sources))})")
    for path in sources.values():
        if tars := stream_tars(path):
            require_tars(tars, ranks)
        else:
            find_set(path, modality)


# ------------------------------------------------------------------------------ across the ranks


class UnfitNodes(RuntimeError):
    """Nodes that cannot take part in this run."""

    def __init__(self, reasons: dict[str, str]) -> None:
        super().__init__("; ".join(f"node {node}: {reason}" for node, reason in reasons.items()))
        self.nodes = list(reasons)


@dataclass(frozen=True)
class Finding:
    """The findings of one rank."""

    node: str
    code: str
    config: str
    sees_run: bool
    free: int  # bytes on the run folder's disk
    right_sum: bool


def leave_token(run: RunFolder) -> Path:
    """Creates a file in the run folder that every rank must see; rank 0 removes it afterwards.
    Raises UserError if the folder cannot be written."""
    token = run.root / f".preflight.{node_name()}.{os.getpid()}"
    try:
        run.root.mkdir(parents=True, exist_ok=True)
        token.touch()
    except OSError as error:
        raise unwritable(run.root, error) from None
    return token


def examine(config: Config, token: Path, right_sum: bool) -> Finding:
    """The findings of this rank. right_sum: whether an all-reduce over all ranks was correct."""
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
    """{node: why it cannot take part}; empty if all nodes can.

    Raises UserError for problems that other nodes would not solve: a full disk, all-reduces that
    are wrong everywhere, or code or settings that differ without a majority.
    """
    reasons: dict[str, str] = {}
    for finding in findings:
        if not finding.sees_run:
            reasons[finding.node] = "does not see the run folder"
    seeing = [f for f in findings if f.sees_run]
    if seeing and (free := min(f.free for f in seeing)) < MIN_FREE:
        raise UserError(f"run.dir: its disk has {free / 1e6:.0f} MB free; free some space")
    for key, what in (("code", "code"), ("config", "settings")):
        counts = Counter(getattr(finding, key) for finding in findings).most_common()
        if len(counts) > 1 and counts[0][1] == counts[1][1]:
            groups = {
                value: {f.node for f in findings if getattr(f, key) == value} for value, _ in counts
            }
            shown = " / ".join(", ".join(sorted(nodes)) for nodes in groups.values())
            raise UserError(
                f"the ranks have different {what}: {shown}; start all from the same files"
            )
        for finding in findings:
            if getattr(finding, key) != counts[0][0]:
                reasons.setdefault(finding.node, f"differs in {what} from most ranks")
    wrong = [finding.node for finding in findings if not finding.right_sum]
    if len(wrong) == len(findings) > 1:
        raise UserError(
            "an all-reduce over the ranks fails on all nodes (wrong sum or timeout); check the "
            "network (NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME; NCCL_DEBUG=INFO logs more)"
        )
    for node in wrong:
        reasons.setdefault(node, "an all-reduce over the ranks fails (wrong sum or timeout)")
    return reasons
