"""Heartbeats: the state of each rank, written every few seconds and read by other processes.

    watchdog of a rank --beat--> heartbeat/rankNNNNN.json --heartbeats--> status, other watchdogs

Imports no torch.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from d2v_ds.run.run_folder import RunFolder


@dataclass(frozen=True)
class Heartbeat:
    """The last heartbeat of a rank."""

    rank: int
    host: str
    step: int
    phase: str  # starting, data, training, saving, ended
    since: float  # when the phase began, in seconds since 1970
    time: float  # when this was written: old if the process is stopped, whatever its phase
    busy_seconds: float = 0.0  # per step, for data and forward, in which no rank waits for another
    wait_seconds: float = 0.0  # per step, the part of busy_seconds spent waiting for data


def beat(run: RunFolder, heartbeat: Heartbeat) -> None:
    """Writes one rank's heartbeat; not durably, because the next one follows."""
    path = run.heartbeat / f"rank{heartbeat.rank:05d}.json"
    aside = path.with_suffix(".tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    aside.write_text(json.dumps(asdict(heartbeat)))
    aside.replace(path)


def heartbeats(run: RunFolder) -> list[Heartbeat]:
    """The last heartbeat of every rank, by rank."""
    return [
        Heartbeat(**json.loads(path.read_text()))
        for path in sorted(run.heartbeat.glob("rank*.json"))
    ]


def duration(seconds: float) -> str:
    """Hours, minutes and seconds: 1:05:09."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
