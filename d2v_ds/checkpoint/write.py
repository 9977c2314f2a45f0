"""Writing: every rank writes its pieces to a temporary folder; rank 0 publishes it by a rename."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from d2v_ds.checkpoint.format import FORMAT, Files, Shapes, StateKind, check_cover, piece_table
from d2v_ds.engine import Pieces
from d2v_ds.files import sha256, sync, write_durably
from d2v_ds.run.run_folder import Generation, RunFolder, refuse_superseded

PACKAGES = ("d2v-ds", "torch", "deepspeed", "safetensors")  # whose versions are recorded


def write_pieces(aside: Path, rank: int, kinds: Mapping[StateKind, Pieces]) -> Files:
    """Writes one rank's pieces into the folder `aside` and waits until they are on disk; returns
    {file name: its entry in the manifest}, empty if there are none."""
    tensors = {
        f"{kind}/{name}": values.detach().cpu()
        for kind, pieces in kinds.items()
        for name, (_, values) in pieces.items()
    }
    if not tensors:
        return {}
    for key, values in tensors.items():
        assert values.dtype == torch.float32 and values.dim() == 1, f"{key}: not flat fp32"
    path = aside / f"rank{rank:05d}.safetensors"
    save_file(tensors, path)
    sync(path)
    table = {
        kind: {name: [offset, values.numel()] for name, (offset, values) in pieces.items()}
        for kind, pieces in kinds.items()
    }
    return {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256(path), "pieces": table},
    }


def build_manifest(
    step: int,
    state: Mapping[str, Any],
    shapes: Shapes,
    adam_steps: Mapping[str, int],
    files: Sequence[Files],
) -> dict[str, Any]:
    """manifest.json: everything except the tensors. files: the results of write_pieces by rank."""
    return {
        "format": FORMAT,
        "step": step,
        "state": dict(state),
        "versions": _versions(),
        "shapes": {name: list(shape) for name, shape in shapes.items()},
        "adam_steps": dict(adam_steps),
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
    check_cover(piece_table(manifest["files"]), manifest["shapes"], manifest["adam_steps"])
    text = json.dumps(manifest) + "\n"
    write_durably(aside / "manifest.json", text)
    write_durably(aside / "COMPLETE", hashlib.sha256(text.encode()).hexdigest() + "\n")
    sync(aside)
    target = run.checkpoint(step)
    replaced = run.checkpoints / f".{step:08d}.replaced"
    refuse_superseded(run, generation)
    if target.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        os.rename(target, replaced)
    os.rename(aside, target)
    sync(run.checkpoints)
    shutil.rmtree(replaced, ignore_errors=True)
    return target


def clean(run: RunFolder) -> None:
    """Removes the remains of interrupted saves. Rank 0 calls it after it has claimed the folder.

    A checkpoint that was moved away for a replacement that failed is renamed back.
    """
    if not run.checkpoints.is_dir():
        return
    for path in run.checkpoints.glob(".*"):
        step, _, suffix = path.name[1:].partition(".")
        if suffix == "replaced" and not (run.checkpoints / step).exists():
            os.rename(path, run.checkpoints / step)
        else:
            shutil.rmtree(path, ignore_errors=True)
    sync(run.checkpoints)


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions
