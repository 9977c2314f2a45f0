"""The files of a run folder: rows, markers, heartbeats, checkpoints and the state in them."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import save

from d2v_ds.checkpoint import newest_verified, open_checkpoint
from d2v_ds.errors import UserError
from d2v_ds.loader.quarantine import names_of
from d2v_ds.records import last_row, metrics_rows
from d2v_ds.run import status
from d2v_ds.run.heartbeat import heartbeats
from d2v_ds.run.run_folder import RunFolder, claim_generation, read_generation
from d2v_ds.run.status import describe, finish, training
from d2v_ds.telemetry.metrics import MetricsWriter
from d2v_ds.train_state import TrainState
from tests.fuzz.harness import Target
from tests.fuzz.mutations import any_bytes, head_bytes, json_values, text_lines
from tests.helpers import checkpoint_pieces as pieces

NOTHING: tuple[type[BaseException], ...] = ()  # damage is no error: a log never blocks a run


def _quiet() -> None:
    logging.getLogger("d2v_ds").setLevel(logging.CRITICAL)


# ------------------------------------------------------------------------------------------- rows


def _rows(folder: Path) -> Sequence[bytes]:
    rows = [{"step": n, "time": 1e9 + n, "loss": 5.0 / n, "step_s": 0.5} for n in (1, 2, 3, 9)]
    rows.append({"step": 2, "time": 2e9, "evaluation": "knn", "eval/knn/test": 0.5})
    return ["".join(json.dumps(row) + "\n" for row in rows).encode()]


def _resume(data: bytes, folder: Path) -> Any:
    """What a resumed run, status and the card of an export make of metrics.jsonl."""
    _quiet()
    run = RunFolder(folder)
    (folder / "metrics.jsonl.damaged").unlink(missing_ok=True)
    run.metrics.write_bytes(data)
    last_row(run.metrics)
    MetricsWriter(run, {}, step=3).close()
    kept = metrics_rows(run.metrics)
    assert all(row["step"] <= 3 for row in kept)
    assert len(kept) == run.metrics.read_bytes().count(b"\n"), "damage stays"
    return kept


def _lists(folder: Path) -> Sequence[bytes]:
    bad = {"sample_id": 3, "tar": "/a/b.tar", "key": "c", "reason": "is damaged", "kind": "other"}
    return [(json.dumps(bad) + "\n").encode() * 3]


def _names(data: bytes, folder: Path) -> Any:
    _quiet()
    (folder / "rank00000.jsonl").write_bytes(data)
    return names_of(folder, {"rank00000.jsonl": 1})


# ----------------------------------------------------------------------------- markers, heartbeats


def _beats(folder: Path) -> Sequence[bytes]:
    beat = {"rank": 0, "host": "n1", "step": 7, "phase": "data", "since": 1.0, "time": 4e9}
    new = {"generation": 1, "count": 5, "phase_seconds": 2.0, "reason": "", "lost": 3}
    return [json.dumps(each).encode() for each in (beat, {**beat, **new})]


def _state_of(folder: Path) -> RunFolder:
    run = RunFolder(folder)
    if not run.config.exists():
        run.config.write_text("run: {steps: 50}\nmodality: {speech: {}, text: {}}\n")
    return run


def _read_beat(data: bytes, folder: Path) -> Any:
    run = _state_of(folder)
    run.heartbeat.mkdir(exist_ok=True)
    (run.heartbeat / "rank00000.json").write_bytes(data)
    found = heartbeats(run)
    status.OBSERVED = 0.0
    describe(run.root)
    return found


def _owners(folder: Path) -> Sequence[bytes]:
    run = RunFolder(folder)
    claim_generation(run, "4711", 2)
    return [run.generation.read_bytes()]


def _read_owner(data: bytes, folder: Path) -> Any:
    _quiet()
    run = _state_of(folder)
    run.generation.write_bytes(data)
    found = read_generation(run)
    describe(run.root)
    assert claim_generation(run, "local").number > (found.number if found else 0)
    return found


def _markers(folder: Path) -> Sequence[bytes]:
    run = RunFolder(folder)
    finish(run, claim_generation(run, "local"), 50, done=True, reason="all 50 steps")
    return [run.done.read_bytes()]


def _read_marker(data: bytes, folder: Path) -> Any:
    run = _state_of(folder)
    run.done.write_bytes(data)
    training(run)
    return describe(run.root).splitlines()[1]


# -------------------------------------------------------------------------------------- checkpoints


def _train_states(folder: Path) -> Sequence[bytes]:
    full = {
        **{"step": 7, "samples": 90, "units": {"speech": 1.5}, "score": 0.5, "skipped": 1},
        **{"cursor": {"speech/a": {"epoch": 1}}, "read": {"speech/a": 90}, "not_finite": 0.0},
        **{"best": {"step": 5, "score": 0.5, "since": 1}, "bad": {"speech/a": 2}},
        **{"replaced": {"silent": 3}, "listed": {"rank00000.jsonl": 2}},
    }
    old = {"step": 7, "samples": 90, "units": {}, "position": {"speech": {"epoch": 1}}}
    return [json.dumps(each).encode() for each in (full, old)]


def _train_state(data: bytes, folder: Path) -> Any:
    try:
        raw = json.loads(data)
    except (ValueError, RecursionError):  # open_checkpoint refuses it
        raise UserError("not JSON") from None
    return TrainState.from_manifest(raw)


def _write_checkpoint(folder: Path) -> RunFolder:
    run = RunFolder(folder / "run")
    if not run.checkpoints.exists():
        generation = claim_generation(run, "local")
        for step in (3, 7):
            pieces.save(run, generation, step, pieces.whole(step), keep=2)
    return run


def _values(run: RunFolder) -> Any:
    """Of the newest valid checkpoint, as a resumed run has them."""
    _quiet()
    found = newest_verified(run)
    assert found is not None
    state = pieces.empty()
    found.restore(state.partitions, state.ema, pieces.SHAPES)
    whole = {kind: found.tensors(kind).keys() for kind in ("master", "ema")}
    return found.step, found.state, pieces.values_of(state), whole


def _file_target(name: str) -> Target:
    """One file of the newest checkpoint: damage leads to the one before."""

    def seeds(folder: Path) -> Sequence[bytes]:
        return [(_write_checkpoint(folder).checkpoint(7) / name).read_bytes()]

    def parse(data: bytes, folder: Path) -> Any:
        run = _write_checkpoint(folder)
        (run.checkpoint(7) / name).write_bytes(data)
        step, *values = _values(run)
        if step == 3:
            raise UserError("the checkpoint is skipped")
        return values

    return Target(f"checkpoint {name}", seeds, parse, head_bytes, (UserError,), protected=True)


def _manifests(folder: Path) -> Sequence[bytes]:
    return [(_write_checkpoint(folder).checkpoint(7) / "manifest.json").read_bytes()]


def _sealed_manifest(data: bytes, folder: Path) -> Any:
    """A manifest of somebody else, with a COMPLETE that fits to it."""
    from hashlib import sha256

    path = _write_checkpoint(folder).checkpoint(7)
    (path / "manifest.json").write_bytes(data)
    (path / "COMPLETE").write_text(sha256(data).hexdigest())
    found = open_checkpoint(path)
    found.verify()
    return found.step, [{n: t.tolist() for n, t in found.tensors(k).items()} for k in KINDS]


KINDS = ("master", "ema")


def _tensor_files(folder: Path) -> Sequence[bytes]:
    return [save({"master/a": torch.arange(6.0)})]


def _tensor_file(data: bytes, folder: Path) -> Any:
    """A file of tensors that nobody has verified, as when weights are read."""
    from hashlib import sha256

    path = folder / "one"
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    (path / "rank00000.safetensors").write_bytes(data)
    entry = {"bytes": 0, "sha256": "", "pieces": {"master": {"a": [0, 6]}}}
    manifest = {
        **{"format": 2, "step": 7, "state": {}, "versions": {}, "shapes": {"a": [2, 3]}},
        **{"adam_steps": {"a": 1}, "files": {"rank00000.safetensors": entry}},
    }
    text = json.dumps(manifest).encode()
    (path / "manifest.json").write_bytes(text)
    (path / "COMPLETE").write_text(sha256(text).hexdigest())
    return {n: t.tolist() for n, t in open_checkpoint(path).tensors("master").items()}


def _lines(data: bytes, rng: Random) -> bytes:
    return text_lines(data, rng) if rng.random() < 0.7 else any_bytes(data, rng)


TARGETS = [
    Target("metrics.jsonl", _rows, _resume, _lines, NOTHING, protected=False),
    Target("bad_samples", _lists, _names, _lines, NOTHING, protected=False),
    Target("heartbeat", _beats, _read_beat, json_values, NOTHING, protected=False),
    Target("GENERATION", _owners, _read_owner, json_values, NOTHING, protected=False),
    Target("DONE", _markers, _read_marker, json_values, NOTHING, protected=False),
    Target("train state", _train_states, _train_state, json_values, (UserError,), protected=False),
    *(_file_target(name) for name in ("manifest.json", "COMPLETE", "rank00000.safetensors")),
    Target("manifest", _manifests, _sealed_manifest, json_values, (UserError,), protected=False),
    Target("safetensors", _tensor_files, _tensor_file, head_bytes, (UserError,), protected=False),
]
