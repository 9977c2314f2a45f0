"""Processes that tests start and kill."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


def alive(pids: Iterable[int]) -> list[int]:
    """The processes that are still running; zombies are not."""
    running = []
    for pid in pids:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            continue
        running += [pid] if state != "Z" else []
    return running
