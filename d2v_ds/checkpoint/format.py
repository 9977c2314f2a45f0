"""What saving and loading agree on: the kinds of tensors, the table of pieces, checksums."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor

from d2v_ds.engine import Partition
from d2v_ds.errors import UserError

Kind = Literal["master", "exp_avg", "exp_avg_sq", "ema", "ema_compensation"]
Shapes = Mapping[str, tuple[int, ...]]  # of whole parameters, by name
Pieces = Mapping[str, tuple[int, Tensor]]  # name -> (offset, flat fp32 values)
Files = Mapping[str, Mapping[str, Any]]  # name -> its entry in the manifest: bytes, sha256, pieces
PieceTable = Mapping[str, Mapping[str, list[tuple[int, int, str]]]]
# kind -> parameter name -> [(offset, length, file)], ascending

FORMAT = 2  # 2: with the compensation of the averages
PARTITION_KINDS: tuple[Kind, ...] = ("master", "exp_avg", "exp_avg_sq")
EMA_KINDS: tuple[Kind, ...] = ("ema", "ema_compensation")
KINDS = PARTITION_KINDS + EMA_KINDS


class DamagedCheckpoint(UserError):
    """A checkpoint that is incomplete, or not what was written."""


def by_kind(partitions: Mapping[str, Partition], ema: Mapping[Kind, Pieces]) -> dict[Kind, Pieces]:
    """The pieces that one rank owns. ema: of each of EMA_KINDS; empty without a teacher."""
    assert set(ema) in (set(EMA_KINDS), set()), f"the average has {EMA_KINDS}, got {list(ema)}"
    kinds: dict[Kind, Pieces] = {
        kind: {
            name: (partition.offset, getattr(partition, kind))
            for name, partition in partitions.items()
        }
        for kind in PARTITION_KINDS
    }
    return {**kinds, **ema}


def piece_table(files: Files) -> PieceTable:
    """Where every piece lies."""
    table: dict[str, dict[str, list[tuple[int, int, str]]]] = {kind: {} for kind in KINDS}
    for file, entry in files.items():
        for kind, pieces in entry["pieces"].items():
            for name, (offset, length) in pieces.items():
                table[kind].setdefault(name, []).append((offset, length, file))
    for by_name in table.values():
        for places in by_name.values():
            places.sort()
    return table


def check_cover(
    table: PieceTable, shapes: Mapping[str, Any], adam_steps: Mapping[str, int]
) -> None:
    """Every parameter lies in the files exactly once, whole: else the run could not go on."""
    for kind, by_name in table.items():
        for name, places in by_name.items():
            assert name in shapes, f"{kind} of {name}: a parameter without a shape"
            end = 0
            for offset, length, file in places:
                assert offset == end, f"{kind} of {name}: {file} begins at {offset}, not at {end}"
                end += length
            assert end == math.prod(shapes[name]), f"{kind} of {name}: ends at {end}"
    missing = [n for n in shapes if n not in table["master"] and n not in table["ema"]]
    assert not missing, f"no rank owns {missing[0]}"
    assert set(table["master"]) == set(adam_steps), "masters and Adam's steps differ in names"
    assert table["ema"].keys() == table["ema_compensation"].keys(), "averages lack a part"
