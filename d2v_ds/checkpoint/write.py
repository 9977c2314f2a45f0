"""Saving: every rank writes its pieces aside, rank 0 publishes them and keeps the last few."""

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

from d2v_ds.checkpoint.format import (
    FORMAT,
    Files,
    Kind,
    Pieces,
    Shapes,
    by_kind,
    check_cover,
    piece_table,
    sha256,
)
from d2v_ds.checkpoint.together import all_gather, own_rank, together
from d2v_ds.engine import Shard
from d2v_ds.errors import UserError
from d2v_ds.run_folder import Generation, RunFolder, refuse_superseded, sync, write_durably

log = logging.getLogger(__name__)

PACKAGES = ("d2v-ds", "torch", "deepspeed", "safetensors")  # whose versions are recorded


def save(
    run: RunFolder,
    generation: Generation,
    step: int,
    *,
    shards: Mapping[str, Shard],
    ema: Pieces,
    shapes: Shapes,
    state: Mapping[str, Any],
    keep: int,
    replicated: bool = False,
) -> Path:
    """Writes and publishes checkpoints/STEP, then removes all but the last `keep`; its path.

    All ranks call it together, each with the pieces it owns; `shapes` has every parameter of every
    rank and of the teacher. state: what JSON takes, at least all that training needs to go on.
    replicated: every rank holds everything, and rank 0 alone writes. Returns, or raises, on all
    ranks alike: UserError when the disk is too full, Superseded when a newer start owns the run
    folder, SaveError for whatever else went wrong. Then the run folder is as it was.
    """
    rank, on_rank_0 = own_rank(), own_rank() == 0
    own = on_rank_0 or not replicated
    kinds = by_kind(shards, ema) if own else {}
    steps = {name: int(shard.adam_step) for name, shard in shards.items()} if own else {}
    size = sum(values.nbytes for pieces in kinds.values() for _, values in pieces.values())
    needed = sum(all_gather(size))
    aside = run.checkpoints / f".{step:08d}.{generation.number}.tmp"
    try:
        together(lambda: _prepare(run, generation, aside, needed) if on_rank_0 else None)
        files = together(lambda: write_pieces(aside, rank, kinds))
        adam_steps = _merge_steps(all_gather(steps))
        manifest = build_manifest(step, state, shapes, adam_steps, files)
        together(lambda: publish(run, generation, aside, manifest) if on_rank_0 else None)
    except BaseException:
        if on_rank_0:
            shutil.rmtree(aside, ignore_errors=True)
        raise
    if on_rank_0:
        _retain(run, step, keep)
    return run.checkpoint(step)


def write_pieces(aside: Path, rank: int, kinds: Mapping[Kind, Pieces]) -> Files:
    """Writes one rank's pieces into the folder `aside`, and waits until they are on the disk;
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
    """manifest.json: everything but the tensors. files: what write_pieces gave on each rank."""
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
    """Makes the checkpoint in the folder `aside` visible: the only way for one to become so.

    The files of all ranks lie in `aside`, on the disk. Raises Superseded when a newer start owns
    the run folder: nothing that anyone reads has changed then. An older checkpoint of the same step
    is replaced (it was damaged, or training came by again).
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
    """Removes what saves that were cut short left behind; rank 0 calls it after its claim.

    A checkpoint that was about to be replaced, and was not, gets its name back.
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


def _prepare(run: RunFolder, generation: Generation, aside: Path, needed: int) -> None:
    """The folder to write into, if there is room and this start still owns the run."""
    refuse_superseded(run, generation)
    run.checkpoints.mkdir(exist_ok=True)
    free = shutil.disk_usage(run.checkpoints).free
    if free < needed * 1.01 + 2**20:  # file headers and the manifest come on top
        raise UserError(
            f"{run.checkpoints}: a checkpoint needs {needed / 1e9:.3g} GB, {free / 1e9:.3g} GB are "
            "free; free some space, or lower save.keep (one more than that lies here while saving)"
        )
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()


def _merge_steps(ranks: list[dict[str, int]]) -> dict[str, int]:
    """Adam's own step by parameter; every rank that owns a piece must have counted the same."""
    merged: dict[str, int] = {}
    for steps in ranks:
        for name, step in steps.items():
            assert merged.setdefault(name, step) == step, f"{name}: ranks differ in Adam's step"
    return merged


def _retain(run: RunFolder, step: int, keep: int) -> None:
    """Removes all but the last `keep` checkpoints up to `step`, which was just published.

    Those of later steps, left by a start that went on from a damaged one, are not counted and not
    touched: training comes by and replaces them.
    """
    for old in [s for s in run.steps() if s <= step][:-keep]:
        removed = run.checkpoints / f".{old:08d}.removed"
        try:
            os.rename(run.checkpoint(old), removed)
            sync(run.checkpoints)  # else a power cut could leave the name and take the files
            shutil.rmtree(removed)
        except OSError as error:  # an old checkpoint too many is no reason to end a run
            log.warning("cannot remove %s: %s", run.checkpoint(old), error)


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions
