"""Functions that the processes of tests/checkpoint/test_faults.py run. Tests kill some."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from d2v_ds import checkpoint
from d2v_ds.run.run_folder import Generation, RunFolder
from tests.helpers import checkpoint_pieces as pieces

BOUNDARIES = ("mkdir", "rename", "fsync", "unlink", "rmdir")  # os functions that change the disk


def start(
    ranks: int, folder: Path, function: Callable[..., Any], *arguments: Any
) -> list[ForkServerProcess]:
    """Runs function(rank, *arguments) in `ranks` processes, with a process group if there are
    several. The result or error of each is saved to FOLDER/result.RANK."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "d2v_ds.checkpoint"])  # imported only once
    processes = [
        context.Process(target=_rank, args=(rank, ranks, folder, function, arguments))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    return processes


def finish(processes: list[ForkServerProcess], seconds: float = 60) -> list[int | None]:
    """Exit codes by rank. A process that hangs is killed; its exit code is None."""
    codes: list[int | None] = []
    for process in processes:
        process.join(seconds)
        codes.append(process.exitcode)
        if process.exitcode is None:
            process.kill()
            process.join()
    return codes


def result(folder: Path, rank: int) -> Any:
    return torch.load(folder / f"result.{rank}")


def _rank(
    rank: int, ranks: int, folder: Path, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if ranks > 1:
        store = dist.FileStore(str(folder / "store"), ranks)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    try:
        value = function(rank, *arguments)
    except Exception as error:
        value = f"{type(error).__name__}: {error}"
    torch.save(value, folder / f"result.{rank}")
    if dist.is_initialized():
        dist.destroy_process_group()


def die_at(boundary: int) -> None:
    """From now on, kills this process (SIGKILL) before its change of the disk number `boundary`."""
    passed = 0

    def guarded(call: Callable[..., Any]) -> Callable[..., Any]:
        def change(*arguments: Any, **options: Any) -> Any:
            nonlocal passed
            if passed == boundary:
                os.kill(os.getpid(), signal.SIGKILL)
            passed += 1
            return call(*arguments, **options)

        return change

    for name in BOUNDARIES:
        setattr(os, name, guarded(getattr(os, name)))


def save(
    rank: int, ranks: int, root: Path, generation: Generation, step: int, seed: int, keep: int
) -> None:
    own = pieces.cut(pieces.whole(seed), pieces.even_cuts(ranks), rank)
    pieces.save(RunFolder(root), generation, step, own, keep)


def save_and_die(rank: int, victim: int, boundary: int, *arguments: Any) -> None:
    """`save` on every rank; rank `victim` is killed before one of its changes of the disk."""
    if rank == victim:
        die_at(boundary)
    save(rank, *arguments)


def save_on_a_full_disk(
    rank: int, full: int, ranks: int, root: Path, generation: Generation
) -> str:
    """Starts a save on every rank and does not wait for it; the disk of rank `full` is full.
    Returns the error that a later step raised."""
    from d2v_ds.checkpoint import write

    def no_room(*_: object) -> None:
        time.sleep(0.5)
        raise OSError(28, "No space left on device")

    if rank == full:
        write.save_file = no_room
    saver = checkpoint.Saver(RunFolder(root), generation, keep=1)
    pieces.begin(saver, 10, pieces.cut(pieces.whole(2), pieces.even_cuts(ranks), rank))
    for boundary in range(1000):
        try:
            saver.poll()
        except checkpoint.CannotSave as error:
            saver.finish()  # no save is in progress any more
            assert boundary > 0
            return str(error)
        time.sleep(0.01)
    return "no error"


def save_replicated(rank: int, root: Path, generation: Generation, seed: int) -> None:
    own = pieces.whole(seed)
    pieces.save(RunFolder(root), generation, 10, own, 2, replicated=True)


def load(rank: int, ranks: int, root: Path) -> tuple[int, list[str], dict[str, Any]]:
    """(step of the newest valid checkpoint, files that this rank verified, this rank's values)."""
    from d2v_ds.checkpoint import read

    seen: list[str] = []
    sha256 = read.sha256

    def remember(path: Path) -> str:
        seen.append(str(path.relative_to(root / "checkpoints")))
        return sha256(path)

    read.sha256 = remember
    opened = checkpoint.newest_verified(RunFolder(root))
    assert opened is not None
    own = pieces.cut(pieces.empty(), pieces.flat_cuts(ranks), rank)
    opened.restore(own.partitions, own.ema, pieces.SHAPES)
    return opened.step, seen, pieces.values_of(own)
