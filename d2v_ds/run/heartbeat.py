"""Heartbeats: the state of each rank, written every few seconds and read by other processes.

    watchdog of a rank --beat--> heartbeat/rankNNNNN.json --heartbeats--> status, other watchdogs
    two looks at the same file: a rank whose `count` has not changed is silent

The clocks of nodes differ and are set while runs train, so nobody compares times of two nodes to
decide whether a rank is alive. Imports no torch.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any

from d2v_ds.records import is_step, number, read_object
from d2v_ds.run.run_folder import RunFolder

ENDED = "ended"  # the phase after an error; `reason` says which
OBSERVED = 7.0  # seconds after which an unchanged heartbeat is silent: more than one interval


@dataclass(frozen=True)
class Heartbeat:
    """The last heartbeat of a rank."""

    rank: int
    host: str
    step: int
    phase: str  # starting, data, training, saving, ended
    since: float  # when the phase began, in seconds since 1970, by the clock of the rank's node
    time: float  # when this was written, by the same clock
    busy_seconds: float = 0.0  # per step, for data and forward, in which no rank waits for another
    wait_seconds: float = 0.0  # per step, the part of busy_seconds spent waiting for data
    generation: int = 0  # of the start that the rank belongs to; 0: written by an older version
    count: int = 0  # of heartbeats
    phase_seconds: float = 0.0  # how long the phase had lasted, by a clock that nobody sets
    reason: str = ""  # why the rank has ended
    lost: int = 0  # rows of metrics that could not be written

    @staticmethod
    def decode(found: dict[str, Any] | None) -> Heartbeat | None:
        """From the content of a file; None if it is damaged."""
        known = {field.name: field.type for field in fields(Heartbeat)}
        values = {name: value for name, value in (found or {}).items() if name in known}
        for name, value in values.items():
            sound = {
                "int": is_step(value),
                "float": number(values, name) is not None,
                "str": isinstance(value, str),
            }
            if not sound[str(known[name])]:
                return None
        try:
            return Heartbeat(**values)
        except TypeError:  # a value is missing
            return None


def beat(run: RunFolder, heartbeat: Heartbeat) -> None:
    """Writes one rank's heartbeat; not durably, because the next one follows. On a full disk, the
    last one is overwritten in place, since it already has its space. Raises OSError."""
    path = run.heartbeat / f"rank{heartbeat.rank:05d}.json"
    aside = path.with_suffix(".tmp")
    text = json.dumps(asdict(heartbeat)).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        aside.write_bytes(text)
        aside.replace(path)
    except OSError:
        with path.open("r+b", buffering=0) as file:
            file.write(text.ljust(os.fstat(file.fileno()).st_size))


def heartbeats(run: RunFolder) -> list[Heartbeat]:
    """The last heartbeat of every rank, by rank. Damaged ones are left out."""
    found = []
    for path in sorted(run.heartbeat.glob("rank*.json")):
        try:
            one = Heartbeat.decode(read_object(path))
        except FileNotFoundError:  # a new start has just removed it
            continue
        if one is not None:
            found.append(one)
    return sorted(found, key=lambda one: one.rank)


def unchanged(run: RunFolder, beats: Iterable[Heartbeat], seconds: float) -> list[Heartbeat]:
    """Those of `beats` whose ranks write no other one within `seconds`."""
    still, end = list(beats), time.monotonic() + seconds
    while still and time.monotonic() < end:
        time.sleep(min(0.5, seconds / 5))
        now = {one.rank: one for one in heartbeats(run)}
        still = [one for one in still if now.get(one.rank, one) == one]
    return still


def duration(seconds: float) -> str:
    """Hours, minutes and seconds: 1:05:09."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
