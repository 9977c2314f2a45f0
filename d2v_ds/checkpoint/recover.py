"""At a start: removes what interrupted saves left, and publishes a checkpoint that was complete.

checkpoints/.STEP.GENERATION.tmp/ with the sealed notes of all ranks --assemble--> manifest
    --verified--> checkpoints/STEP/
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from d2v_ds.checkpoint import write
from d2v_ds.checkpoint.read import open_checkpoint
from d2v_ds.errors import UserError
from d2v_ds.files import sync
from d2v_ds.run.run_folder import PARTIAL, RunFolder, remove

log = logging.getLogger("d2v_ds")

LEFT = re.compile(r"\.([0-9]{8,18})\.(removed|replaced)|\.best\.[0-9]+")


def clean(run: RunFolder, newest: int = -1) -> None:
    """Publishes the newest complete checkpoint after step `newest` that a start did not publish,
    and removes the remains of interrupted saves. Rank 0 calls it after it has claimed the folder.

    A checkpoint that was moved away for a replacement that failed is renamed back. Files that no
    start of a run has made stay.
    """
    if not run.checkpoints.is_dir():
        return
    partial = [p for p in run.checkpoints.glob(".*.tmp") if PARTIAL.fullmatch(p.name)]
    for path in sorted(partial, key=lambda p: [int(n) for n in p.name[1:-4].split(".")])[::-1]:
        step = int(path.name[1:].partition(".")[0])
        if step > newest and _publish(run, path, step):
            newest = step
        _remove(path)
    for path in run.checkpoints.glob(".*"):
        found = LEFT.fullmatch(path.name)
        if found and found[2] == "replaced" and not (run.checkpoints / found[1]).exists():
            os.rename(path, run.checkpoints / found[1])
        elif found:
            _remove(path)
    sync(run.checkpoints)


def _publish(run: RunFolder, aside: Path, step: int) -> bool:
    """Publishes the checkpoint in `aside` if it is complete and sound."""
    try:
        if not (aside / "COMPLETE").exists():
            manifest = assemble(aside)
            if manifest is None:
                return False
            write.seal(aside, manifest)
        found = open_checkpoint(aside)
        found.verify()
        if found.step != step:
            return False
        write.move_into_place(run, aside, step)
    except (UserError, AssertionError, OSError) as error:
        log.warning("%s: the remains of a save are removed (%s)", aside, error)
        return False
    log.info("checkpoint %d was complete when an earlier start ended; it is published", step)
    return True


def assemble(aside: Path) -> dict[str, Any] | None:
    """The manifest of a checkpoint that every rank has written to the folder `aside`; None if a
    rank's note is missing or damaged."""
    plan = write.read_note(aside / write.PLAN)
    if plan is None:
        return None
    files = [write.read_note(write.note_of(aside, rank)) for rank in range(plan["owners"])]
    written: list[Mapping[str, Any]] = [entry for entry in files if entry is not None]
    if len(written) < len(files):
        return None
    return write.build_manifest(plan, written)


def _remove(path: Path) -> None:
    try:
        remove(path)
    except OSError as error:
        log.warning("cannot remove %s: %s", path, error)
