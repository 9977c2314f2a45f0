"""Definitions shared by saving and loading: the kinds of tensors and the table of pieces."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from d2v_ds.engine import EmaKind, Partition, Pieces
from d2v_ds.errors import UserError

StateKind = Literal["master", "exp_avg", "exp_avg_sq", "ema", "ema_compensation"]
Shapes = Mapping[str, tuple[int, ...]]  # of whole parameters, by name
EmaPieces = Mapping[EmaKind, Pieces]  # empty for a task without a teacher
Files = Mapping[str, Mapping[str, Any]]  # name -> its entry in the manifest: bytes, sha256, pieces
PieceTable = Mapping[str, Mapping[str, list[tuple[int, int, str]]]]
# kind -> parameter name -> [(offset, length, file)], ascending

FORMAT = 2  # 2: with the compensation of the averages
PARTITION_KINDS: tuple[StateKind, ...] = ("master", "exp_avg", "exp_avg_sq")
EMA_KINDS: tuple[EmaKind, ...] = ("ema", "ema_compensation")
KINDS: tuple[StateKind, ...] = (*PARTITION_KINDS, *EMA_KINDS)


class DamagedCheckpoint(UserError):
    """A checkpoint that is incomplete or differs from what was written."""


class CannotSave(UserError):
    """A checkpoint that cannot be written, for example because the disk is full. Raised on all
    ranks; the run folder is unchanged, and a later save may succeed."""


def by_kind(partitions: Mapping[str, Partition], ema: EmaPieces) -> dict[StateKind, Pieces]:
    """The pieces that one rank owns, of every kind."""
    assert set(ema) in (set(EMA_KINDS), set()), f"an EMA has {EMA_KINDS}, got {list(ema)}"
    kinds: dict[StateKind, Pieces] = {
        kind: {name: (own.offset, getattr(own, kind)) for name, own in partitions.items()}
        for kind in PARTITION_KINDS
    }
    for kind, pieces in ema.items():
        kinds[kind] = pieces
    return kinds


def piece_table(files: Files) -> PieceTable:
    """Which file holds which piece."""
    table: dict[str, dict[str, list[tuple[int, int, str]]]] = {kind: {} for kind in KINDS}
    for file, entry in files.items():
        for kind, pieces in entry["pieces"].items():
            for name, (offset, length) in pieces.items():
                table[kind].setdefault(name, []).append((offset, length, file))
    for by_name in table.values():
        for extents in by_name.values():
            extents.sort()
    return table


def check_cover(
    table: PieceTable, shapes: Mapping[str, Any], adam_steps: Mapping[str, int]
) -> None:
    """Asserts that the files hold every parameter whole and exactly once, so that a run can
    resume from them."""
    for kind, by_name in table.items():
        for name, extents in by_name.items():
            assert name in shapes, f"{kind} of {name}: a parameter without a shape"
            end = 0
            for offset, length, file in extents:
                assert offset == end, f"{kind} of {name}: {file} begins at {offset}, not at {end}"
                end += length
            assert end == math.prod(shapes[name]), f"{kind} of {name}: the pieces end at {end}"
    missing = [n for n in shapes if n not in table["master"] and n not in table["ema"]]
    assert not missing, f"no rank owns {missing[0]}"
    assert set(table["master"]) == set(adam_steps), "masters and Adam steps differ in names"
    assert table["ema"].keys() == table["ema_compensation"].keys(), "an EMA lacks its compensation"
