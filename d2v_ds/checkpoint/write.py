"""Writing: every rank writes its pieces to a temporary folder; rank 0 publishes it by a rename.

Until then, sealed notes of all ranks say what was written, so that a complete checkpoint can be
published without them: by rank 0 after an error, or by the next start (recover.py).
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from d2v_ds.checkpoint.format import FORMAT, Files, StateKind, check_cover, piece_table
from d2v_ds.engine import Pieces
from d2v_ds.files import sha256, sync, write_durably
from d2v_ds.run.run_folder import Generation, RunFolder, refuse_superseded, remove

log = logging.getLogger("d2v_ds")

PLAN = "plan.json"  # the note of rank 0 about the whole checkpoint
PACKAGES = ("d2v-ds", "torch", "deepspeed", "safetensors")  # whose versions are recorded


def write_pieces(
    aside: Path,
    rank: int,
    kinds: Mapping[StateKind, Pieces],
    plan: Mapping[str, Any] | None = None,
) -> Files:
    """Writes one rank's pieces and its note into the folder `aside` and waits until they are on
    disk; returns {file name: its entry in the manifest}, empty if there are none. plan: the note
    about the whole checkpoint, on rank 0."""
    if plan is not None:
        write_note(aside / PLAN, plan)
    tensors = {
        f"{kind}/{name}": values.detach().cpu()
        for kind, pieces in kinds.items()
        for name, (_, values) in pieces.items()
    }
    files: Files = {}
    if tensors:
        for key, values in tensors.items():
            assert values.dtype == torch.float32 and values.dim() == 1, f"{key}: not flat fp32"
        path = aside / f"rank{rank:05d}.safetensors"
        save_file(tensors, path)
        sync(path)
        table = {
            kind: {name: [offset, values.numel()] for name, (offset, values) in pieces.items()}
            for kind, pieces in kinds.items()
        }
        entry = {"bytes": path.stat().st_size, "sha256": sha256(path), "pieces": table}
        files = {path.name: entry}
    write_note(note_of(aside, rank), files)
    return files


def note_of(aside: Path, rank: int) -> Path:
    """The note of one rank: the entries of its files in the manifest."""
    return aside / f"rank{rank:05d}.json"


def write_note(path: Path, content: Mapping[str, Any]) -> None:
    """JSON in the first line, its SHA-256 in the second."""
    text = json.dumps(content)
    write_durably(path, f"{text}\n{hashlib.sha256(text.encode()).hexdigest()}\n")


def read_note(path: Path) -> dict[str, Any] | None:
    """None if there is no note, or if it differs from what was written."""
    try:
        text, _, seal = path.read_bytes().partition(b"\n")
    except OSError:
        return None
    if hashlib.sha256(text).hexdigest().encode() != seal.strip():
        return None
    content: dict[str, Any] = json.loads(text)
    return content


def build_manifest(plan: Mapping[str, Any], files: Sequence[Files]) -> dict[str, Any]:
    """manifest.json: everything except the tensors. plan: step, state, shapes and adam_steps.
    files: the results of write_pieces by rank."""
    return {
        "format": FORMAT,
        "step": plan["step"],
        "state": dict(plan["state"]),
        "versions": _versions(),
        "shapes": {name: list(shape) for name, shape in plan["shapes"].items()},
        "adam_steps": dict(plan["adam_steps"]),
        "files": {name: entry for of_rank in files for name, entry in of_rank.items()},
    }


def publish(
    run: RunFolder, generation: Generation, aside: Path, manifest: Mapping[str, Any]
) -> Path:
    """Publishes the checkpoint in the folder `aside`, which holds the files of all ranks, on disk.

    An older checkpoint of the same step is replaced: it was damaged, or an earlier start wrote it.
    Raises Superseded if a newer start owns the run folder; nothing visible has changed then.
    """
    step: int = manifest["step"]
    seal(aside, manifest)
    refuse_superseded(run, generation)
    return move_into_place(run, aside, step)


def seal(aside: Path, manifest: Mapping[str, Any]) -> None:
    """Writes manifest.json and COMPLETE into the folder of a checkpoint whose files are on disk."""
    check_cover(piece_table(manifest["files"]), manifest["shapes"], manifest["adam_steps"])
    text = json.dumps(manifest) + "\n"
    write_durably(aside / "manifest.json", text)
    write_durably(aside / "COMPLETE", hashlib.sha256(text.encode()).hexdigest() + "\n")
    sync(aside)


def move_into_place(run: RunFolder, aside: Path, step: int) -> Path:
    """Renames a complete checkpoint to checkpoints/STEP. If that fails, the earlier checkpoint of
    the same step is still there."""
    for note in aside.glob("*.json"):
        if note.name != "manifest.json":
            note.unlink()
    target = run.checkpoint(step)
    replaced = run.checkpoints / f".{step:08d}.replaced"
    if target.is_symlink() or target.is_file():
        stray = target.with_name(f"{target.name}.stray")
        log.warning("%s: is not a checkpoint; it is renamed to %s", target, stray.name)
        os.rename(target, stray)
    moved = target.exists()
    if moved:
        remove(replaced)
        os.rename(target, replaced)
    try:
        os.rename(aside, target)
    except OSError:
        if moved:
            os.rename(replaced, target)
        raise
    sync(run.checkpoints)
    if moved:
        shutil.rmtree(replaced, ignore_errors=True)
    return target


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions
