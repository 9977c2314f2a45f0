"""Files of JSON in a run folder, as they are after trouble: JSON lines, and single objects.

    metrics.jsonl, evaluations.jsonl, bad_samples/ --lines, parse--> rows, None for a damaged line
    GENERATION, DONE, STOPPED, heartbeat/ --read_object--> dict, None if damaged
    a write that fails --Losses.failed--> one line in the log    --worked--> another line

None of these files may keep a run from resuming or being shown, so damage is no error here: power
failures leave blocks of NULs, full disks leave parts of lines. Imports no torch.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

log = logging.getLogger("d2v_ds")

LONGEST = 1 << 24  # bytes of a line; what is longer is damaged
LARGEST = 1 << 20  # bytes of a file with a single object
STEPS = 2**53  # steps are below; floats are exact there


def parse(line: bytes) -> dict[str, Any] | None:
    """The object in a line; None if it is damaged or holds anything else."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def parse_metrics(line: bytes) -> dict[str, Any] | None:
    """A row of metrics.jsonl, whose `step` is a number of steps; None for any other line."""
    row = parse(line)
    return row if row is not None and is_step(row.get("step")) else None


def is_step(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < STEPS


def number(row: Mapping[str, Any], name: str) -> float | None:
    """A finite number of a row; None if the row has anything else under this name."""
    value = row.get(name)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return float(value) if type(value) is int and abs(value) < 2**63 else None


def lines(path: Path) -> Iterator[bytes]:
    """The lines of a file with their ends; a line of more than LONGEST bytes in pieces. Nothing
    if there is no such file."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        while line := file.readline(LONGEST):
            yield line


def metrics_rows(path: Path) -> list[dict[str, Any]]:
    """All sound rows of metrics.jsonl."""
    return [row for line in lines(path) if (row := parse_metrics(line)) is not None]


def last_row(path: Path) -> dict[str, Any] | None:
    """The last sound row of metrics.jsonl that training wrote, without reading the whole file.
    Rows of evaluations are skipped."""
    window = 1 << 16
    while True:
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                file.seek(max(0, size - window))
                found = file.read(window).split(b"\n")
        except OSError:
            return None
        for line in reversed(found[:-1]):  # what follows the last newline is incomplete
            row = parse_metrics(line)
            if row is not None and "evaluation" not in row:
                return row
        if window >= min(size, LONGEST):
            return None
        window *= 16


def read_object(path: Path) -> dict[str, Any] | None:
    """The JSON object in a small file; None if it is damaged or cannot be read. Raises
    FileNotFoundError."""
    try:
        with path.open("rb") as file:
            return parse(file.read(LARGEST))
    except FileNotFoundError:
        raise
    except OSError:
        return None


def append(file: IO[bytes], data: bytes) -> None:
    """Appends all of `data` to an unbuffered file that only this process writes, or nothing. Raises
    OSError."""
    size = os.fstat(file.fileno()).st_size
    written = 0
    try:
        while written < len(data):
            written += file.write(data[written:])
    except OSError:
        with contextlib.suppress(OSError):
            os.ftruncate(file.fileno(), size)
        raise


def append_line(path: Path, row: Mapping[str, Any]) -> None:
    """Appends one line of JSON in a single write, so that lines of several processes do not mix.
    Values that are not finite become null. The rest of a line that was cut short stays a line of
    its own. Raises OSError."""
    finite = {
        name: None if isinstance(x, float) and not math.isfinite(x) else x
        for name, x in row.items()
    }
    line = json.dumps(finite, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
    with path.open("a+b", buffering=0) as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                line = b"\n" + line
        file.write(line)


def printable(text: str) -> str:
    """`text` without characters that a terminal cannot show, which damaged files may contain."""
    return text.encode(errors="backslashreplace").decode()


class Losses:
    """What was lost of a file that a run can do without. When it cannot be written, the run goes
    on, and the log tells it once, and once more when it works again. unit: what the file consists
    of, in the plural: rows, samples."""

    def __init__(self, path: Path, unit: str) -> None:
        self.path, self.unit = path, unit
        self.total = 0  # since the process began
        self._now = 0  # since writing began to fail

    def failed(self, error: OSError, number: int = 1) -> None:
        """`number` units could not be written."""
        if not self._now:
            log.error(
                "%s: cannot be written (%s); training continues without these %s",
                self.path,
                reason(error),
                self.unit,
            )
        self._now += number
        self.total += number

    def worked(self) -> None:
        if self._now:
            log.warning(
                "%s: can be written again; %d %s were lost", self.path, self._now, self.unit
            )
        self._now = 0


def reason(error: OSError) -> str:
    """The text of the system's error, without the path."""
    return os.strerror(error.errno) if error.errno else str(error)
