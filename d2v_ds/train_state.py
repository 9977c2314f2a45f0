"""The state of a run besides weights; a checkpoint's manifest has it.

TrainState.advance, after every step --> manifest.json --from_manifest--> a resumed run
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from d2v_ds.batch import StepBatch
from d2v_ds.errors import UserError
from d2v_ds.records import is_step, number


@dataclass
class TrainState:
    """The state that a resumed run needs besides weights; stored in the checkpoint's manifest."""

    step: int = 0  # optimizer steps taken
    samples: int = 0  # seen, over all ranks
    units: Mapping[str, float] = field(default_factory=dict)  # {modality: seconds, images, tokens}
    cursor: Mapping[str, Any] = field(default_factory=dict)  # {source: state of its loader}
    score: float | None = None  # of the validation at this step; lower is better (best.py)
    best: Mapping[str, Any] = field(default_factory=dict)  # the best validation so far (best.py)
    read: Mapping[str, int] = field(default_factory=dict)  # {source: samples}, over all ranks
    skipped: int = 0  # attempts without a finite gradient
    not_finite: float = 0.0  # applied steps whose metrics were not finite
    replaced: Mapping[str, int] = field(default_factory=dict)  # {kind of bad samples: replaced}
    bad: Mapping[str, int] = field(default_factory=dict)  # {source: different bad samples}
    listed: Mapping[str, int] = field(default_factory=dict)  # {file of bad_samples/: its lines}

    @staticmethod
    def from_manifest(raw: Any) -> TrainState:
        """Also reads older checkpoints, which call the cursor `position` and count less. Raises
        UserError."""
        if not isinstance(raw, Mapping):
            raise UserError("the checkpoint has no state of the training")
        raw = dict(raw)
        if "position" in raw:
            raw["cursor"] = raw.pop("position")
        if unknown := raw.keys() - {each.name for each in fields(TrainState)}:
            raise UserError(
                f"the checkpoint was written by a newer d2v_ds: its state has "
                f"{', '.join(sorted(map(repr, unknown)))}; use that version"
            )
        for name, value in raw.items():
            if not SOUND[name](value):
                raise UserError(f"the checkpoint's state is damaged: {name} is {str(value)[:80]}")
        return TrainState(**raw)

    def advance(self, batch: StepBatch) -> None:
        self.step += 1
        self.samples += batch.samples
        seen = self.units.get(batch.modality, 0.0) + batch.units
        self.units = {**self.units, batch.modality: seen}
        self.read = {**self.read, batch.source: self.read.get(batch.source, 0) + batch.samples}
        self.cursor = batch.cursor
        self.score = None


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or number({"": value}, "") is not None


def _mapping_of(sound: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, Mapping) and all(map(sound, value.values()))


def _is_best(value: Any) -> bool:
    """Nothing yet, or the fields of best.py."""
    return isinstance(value, Mapping) and (
        not value
        or (value.keys() == {"step", "score", "since"} and all(map(_is_number, value.values())))
    )


SOUND: Mapping[str, Callable[[Any], bool]] = {
    "step": is_step,
    "samples": is_step,
    "units": _mapping_of(_is_number),
    "cursor": _mapping_of(lambda value: isinstance(value, Mapping)),
    "score": lambda value: value is None or _is_number(value),
    "best": _is_best,
    "read": _mapping_of(is_step),
    "skipped": is_step,
    "not_finite": _is_number,
    "replaced": _mapping_of(is_step),
    "bad": _mapping_of(is_step),
    "listed": _mapping_of(is_step),
}
