"""The state of a run, read from its folder, during or after training, from any login node.

    metrics.jsonl, checkpoints/, heartbeat/, GENERATION, DONE, STOPPED --> a few lines

Imports no torch.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from d2v_ds.config.documents import load_yaml
from d2v_ds.errors import UserError
from d2v_ds.files import write_atomically
from d2v_ds.records import is_step, last_row, number, printable, read_object
from d2v_ds.records import reason as reason_of
from d2v_ds.run.heartbeat import ENDED, OBSERVED, Heartbeat, duration, heartbeats, unchanged
from d2v_ds.run.preflight import MIN_FREE
from d2v_ds.run.run_folder import (
    Generation,
    RunFolder,
    read_generation,
    refuse_superseded,
    remove,
)

SILENT = 60.0  # seconds without a heartbeat after which a rank is reported as silent


def finish(run: RunFolder, generation: Generation, step: int, *, done: bool, reason: str) -> None:
    """Writes DONE or STOPPED, which say how the run ended, and removes the other one. Raises
    Superseded if a newer start owns the run folder, UserError if the disk is full."""
    refuse_superseded(run, generation)
    marker, other = (run.done, run.stopped) if done else (run.stopped, run.done)
    fields = {
        "step": step,
        "reason": reason,
        "time": time.time(),
        "generation": generation.number,
    }
    try:
        write_atomically(marker, json.dumps(fields) + "\n")
        remove(other)
    except OSError as error:
        raise UserError(
            f"{marker}: cannot be written ({reason_of(error)}). The run is saved at step {step}; "
            "free some space and run the same command again"
        ) from None


def describe(root: Path) -> str:
    """The lines that `d2v-ds status RUN` prints. Raises UserError if `root` is not a run folder."""
    run = RunFolder(root)
    if not run.config.is_file():
        raise UserError(f"{root}: not a run folder (no config.yaml); give the value of run.dir")
    steps, modalities, damage = _settings(run)
    row, beats, generation = last_row(run.metrics) or {}, of_owner(run), read_generation(run)
    step = max([int(row.get("step", 0)), *(b.step for b in beats)])
    lines = [f"run          {root}", f"state        {_state(run, beats)}"]
    lines.append(f"step         {step} of {steps or 'an unknown number'}")
    if (pace := number(row, "step_s")) and step < steps:
        lines.append(f"time left    {duration((steps - step) * pace)} at the current speed")
    if len(modalities) > 1:
        lines.append(f"modalities   {_by_modality(modalities, row)}")
    saved = run.steps()
    lines.append(
        f"checkpoint   {f'step {saved[-1]} (of {len(saved)} kept)' if saved else 'none yet'}"
    )
    if generation:
        lines.append(
            f"started      {generation.number} time{'s' * (generation.number > 1)}, "
            f"last as job {generation.job}, restart {generation.restart}"
        )
    elif run.generation.exists():
        damage.append(f"{run.generation.name} is damaged; the next start writes it again")
    if len(beats) > 1:
        slow = max(beats, key=lambda b: b.busy_seconds)
        lines.append(
            f"slowest rank {slow.rank} on {slow.host}: {slow.busy_seconds:.3f} s per step, "
            f"excluding waits for other ranks; {slow.wait_seconds:.3f} s of that is waiting for "
            "data"
        )
    if lost := max((b.lost for b in beats), default=0):
        damage.append(f"{lost} rows of metrics could not be written since the last start")
    if (free := shutil.disk_usage(root).free) < MIN_FREE:
        damage.append(f"the disk has {free / 1e6:.0f} MB free, so rows and heartbeats may be lost")
    lines += [f"trouble      {each}" for each in damage]
    return printable("\n".join(lines))


def _settings(run: RunFolder) -> tuple[int, list[str], list[str]]:
    """Of config.yaml: the steps of the run, 0 if unknown; its modalities; the damage."""
    try:
        config = load_yaml(run.config)
        steps, modalities = config["run"]["steps"], list(config["modality"])
        if is_step(steps) and all(isinstance(name, str) for name in modalities):
            return steps, modalities, []
    except (ValueError, OSError, KeyError, TypeError, RecursionError):  # UserError is a ValueError
        pass  # told below
    return 0, [], [f"{run.config.name} is damaged; the next start writes it again"]


def of_owner(run: RunFolder) -> list[Heartbeat]:
    """The heartbeats of the ranks of the last start. Older versions do not write the start."""
    owner = read_generation(run)
    return [b for b in heartbeats(run) if owner is None or b.generation in (0, owner.number)]


def silent(run: RunFolder, beats: Iterable[Heartbeat], seconds: float) -> list[Heartbeat]:
    """Those of `beats` that are not from ranks that live. A heartbeat whose time is not in the last
    SILENT seconds of this clock is watched for `seconds`, since the clocks of nodes differ."""
    now = time.time()
    doubtful = [b for b in beats if not -SILENT <= now - b.time <= SILENT]
    return unchanged(run, doubtful, seconds) if doubtful else []


def training(run: RunFolder) -> bool:
    """Whether a start of the run is training or about to: a rank gives signs of life, and its start
    has not ended the run. A new start removes DONE and STOPPED of the previous one only after its
    first heartbeats."""
    beats = [b for b in of_owner(run) if b.phase != ENDED]
    for marker in (run.done, run.stopped):
        try:
            found = read_object(marker) or {}
        except FileNotFoundError:
            continue
        ended, last = number(found, "time") or 0.0, number(found, "generation")
        beats = [
            b
            for b in beats
            # older versions write no generation
            if (b.generation > last if last and b.generation else b.since > ended)
        ]
    return bool(beats) and len(silent(run, beats, OBSERVED)) < len(beats)


def _by_modality(names: Iterable[str], row: Mapping[str, Any]) -> str:
    """Each modality with its loss in the last row, if it has one."""
    losses = {name: number(row, f"loss/{name}") for name in names}
    return ", ".join(
        f"{name} (loss {loss:.3f})" if loss is not None else name for name, loss in losses.items()
    )


def _state(run: RunFolder, beats: list[Heartbeat]) -> str:
    for marker, word in ((run.done, "finished"), (run.stopped, "stopped")):
        if marker.is_file():
            reason = (read_object(marker) or {}).get("reason", f"{marker.name} is damaged")
            return f"{word}: {reason}"
    ended = [b for b in beats if b.phase == ENDED]
    if ended:
        first = min(ended, key=lambda b: b.since)
        return f"ended with an error: rank {first.rank} on {first.host}: {first.reason}"
    if not beats:
        return "starting: no heartbeat yet"
    now = time.time()
    if quiet := silent(run, beats, OBSERVED):
        oldest = min(quiet, key=lambda b: b.time)
        how_long = "an unknown time"
        if now > oldest.time:
            how_long = duration(now - oldest.time)
        return f"silent: rank {oldest.rank} on {oldest.host} for {how_long}"
    slowest = max(beats, key=lambda b: _in_phase(b, now))
    return f"running: {slowest.phase}, for {duration(_in_phase(slowest, now))}"


def _in_phase(beat: Heartbeat, now: float) -> float:
    """Seconds in the phase. Older versions write only when it began."""
    if beat.generation == 0:
        return max(0.0, now - beat.since)
    return beat.phase_seconds + min(max(0.0, now - beat.time), SILENT)
