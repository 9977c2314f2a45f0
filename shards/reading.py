"""Which input a process reads, in a file beside its shard, so that a killed process can be named.

The system kills a process that takes all memory, which then cannot say what it read.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from d2v_ds.files import TEMPORARY, temporary
from shards.family import Sample

MARK = ".reading"
LONGEST = 512  # bytes of a name


def marked(samples: Iterable[Sample], out: Path, shard: str) -> Iterator[Sample]:
    """The same samples; the file names the one that is read."""
    path = temporary(out / f"{shard}{MARK}")
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        for sample in samples:
            name = str(sample.inputs[0]).encode(errors="backslashreplace")[:LONGEST]
            os.pwrite(file, name.ljust(LONGEST), 0)
            yield sample
    finally:
        os.close(file)
        path.unlink(missing_ok=True)


def inputs_of(out: Path, processes: Collection[int]) -> list[str]:
    """What these processes read when they ended; of all processes if none of them is known."""
    names: dict[int, str] = {}
    for file in sorted(out.glob(f"*{MARK}.*{TEMPORARY}")):
        process = file.name.removesuffix(TEMPORARY).rpartition(".")[2]
        if process.isdecimal():
            names[int(process)] = file.read_bytes().decode(errors="replace").strip()
    return [names[one] for one in processes if one in names] or list(names.values())
