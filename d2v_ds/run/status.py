"""The state of a run, read from its folder, during or after training, from any login node.

    metrics.jsonl, checkpoints/, heartbeat/, GENERATION, DONE, STOPPED --> a few lines

Imports no torch.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from d2v_ds.config.documents import load_yaml
from d2v_ds.errors import UserError
from d2v_ds.files import write_atomically
from d2v_ds.run.heartbeat import Heartbeat, duration, heartbeats
from d2v_ds.run.run_folder import (
    Generation,
    RunFolder,
    read_generation,
    refuse_superseded,
)

SILENT = 60.0  # seconds without a heartbeat after which a rank is reported as silent


def last_row(path: Path) -> dict[str, Any] | None:
    """The last complete row of metrics.jsonl that training wrote, without reading the whole file.
    Rows of evaluations are skipped."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 65_536))
            lines = file.read().split(b"\n")
    except FileNotFoundError:
        return None
    for line in reversed(lines[:-1]):  # what follows the last newline is incomplete
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and "evaluation" not in row:
            return row
    return None


def finish(run: RunFolder, generation: Generation, step: int, *, done: bool, reason: str) -> None:
    """Writes DONE or STOPPED, which say how the run ended, and removes the other one. Raises
    Superseded if a newer start owns the run folder."""
    refuse_superseded(run, generation)
    marker, other = (run.done, run.stopped) if done else (run.stopped, run.done)
    write_atomically(
        marker, json.dumps({"step": step, "reason": reason, "time": time.time()}) + "\n"
    )
    other.unlink(missing_ok=True)


def describe(root: Path) -> str:
    """The lines that `d2v-ds status RUN` prints. Raises UserError if `root` is not a run folder."""
    run = RunFolder(root)
    if not run.config.is_file():
        raise UserError(f"{root}: not a run folder (no config.yaml); give the value of run.dir")
    config = load_yaml(run.config)
    steps = int(config["run"]["steps"])
    row, beats, now = last_row(run.metrics), heartbeats(run), time.time()
    step = max([int(row["step"]) if row else 0, *(b.step for b in beats)])
    lines = [f"run          {root}", f"state        {_state(run, beats, now)}"]
    lines.append(f"step         {step} of {steps}")
    if row and row.get("step_s") and step < steps:
        left = duration((steps - step) * row["step_s"])
        lines.append(f"time left    {left} at the current speed")
    if len(config["modality"]) > 1:
        lines.append(f"modalities   {_by_modality(config['modality'], row or {})}")
    saved = run.steps()
    lines.append(
        f"checkpoint   {f'step {saved[-1]} (of {len(saved)} kept)' if saved else 'none yet'}"
    )
    generation = read_generation(run)
    if generation:
        lines.append(
            f"started      {generation.number} time{'s' * (generation.number > 1)}, "
            f"last as job {generation.job}, restart {generation.restart}"
        )
    if len(beats) > 1:
        slow = max(beats, key=lambda b: b.busy_seconds)
        lines.append(
            f"slowest rank {slow.rank} on {slow.host}: {slow.busy_seconds:.3f} s per step, "
            f"excluding waits for other ranks; {slow.wait_seconds:.3f} s of that is waiting for "
            "data"
        )
    return "\n".join(lines)


def training(run: RunFolder, now: float) -> bool:
    """Whether a start of the run is training or about to: within SILENT seconds a rank gave a sign
    of life, in a phase that began after the run last ended. A new start removes DONE and STOPPED of
    the previous one only after its first heartbeats."""
    markers = [marker for marker in (run.done, run.stopped) if marker.is_file()]
    ended = max((json.loads(marker.read_text())["time"] for marker in markers), default=0.0)
    return any(now - b.time <= SILENT and b.since > ended for b in heartbeats(run))


def _by_modality(names: Iterable[str], row: Mapping[str, Any]) -> str:
    """Each modality with its loss in the last row, if it has one."""
    losses = {name: row.get(f"loss/{name}") for name in names}
    return ", ".join(
        f"{name} (loss {loss:.3f})" if loss is not None else name for name, loss in losses.items()
    )


def _state(run: RunFolder, beats: list[Heartbeat], now: float) -> str:
    for marker, word in ((run.done, "finished"), (run.stopped, "stopped")):
        if marker.is_file():
            return f"{word}: {json.loads(marker.read_text())['reason']}"
    if not beats:
        return "starting: no heartbeat yet"
    oldest = min(beats, key=lambda b: b.time)
    if now - oldest.time > SILENT:
        return f"silent: rank {oldest.rank} on {oldest.host} for {duration(now - oldest.time)}"
    slowest = min(beats, key=lambda b: b.since)
    return f"running: {slowest.phase}, for {duration(now - slowest.since)}"
