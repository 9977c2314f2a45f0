"""The bad samples of a run: each is reported once, and too many of them end the run.

Made.bad --add--> log, RUN/bad_samples/rankNNNNN.jsonl
the files of all ranks, and counts of the checkpoint --Past--> a resumed run goes on
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from d2v_ds.errors import UserError
from d2v_ds.loader.reading import REMEDY, BadSample
from d2v_ds.records import Losses, append_line, lines, parse
from d2v_ds.secrets import mask_values

log = logging.getLogger("d2v_ds")

MAX_BAD = 0.001  # share of bad samples above which a run ends
FIRST = 1_000  # the share is relative to at least this many samples
NAMED = 3  # bad samples that the error names
LOGGED = 20  # bad samples that are logged; later ones are only written to the file
REPLACED = "it is replaced by another sample"

Names = set[tuple[str, str]]  # (tar, key)


@dataclasses.dataclass
class Past:
    """What earlier starts of a run found. read, bad: numbers of samples that count towards the
    share, of one rank; counted: the samples in `bad`, of all ranks; reported: those in the files,
    also of steps that the resumed run repeats."""

    read: float = 0.0
    bad: float = 0.0
    counted: Names = dataclasses.field(default_factory=set)
    reported: Names = dataclasses.field(default_factory=set)


class Quarantine:
    """The bad samples of one rank. file: gets a line of JSON for each; None: no file. most: the
    largest allowed share of the samples read. past: of the starts before this one."""

    def __init__(
        self, file: Path | None = None, most: float = MAX_BAD, past: Past | None = None
    ) -> None:
        self.file, self.most, self.past = file, most, past or Past()
        self.read = 0
        self.bad: dict[tuple[str, str], BadSample] = {}  # by tar and key
        self.new = 0  # of self.bad, those that earlier starts did not count
        self.reported = 0
        self.losses = Losses(file, "bad samples") if file else None

    def add(self, read: int, bad: Sequence[BadSample], then: str = REPLACED) -> None:
        """Records that of `read` more samples these were bad, whether for the first time or not.
        then: what happens to them. Raises UserError if there are too many."""
        self.read += read
        for each in bad:
            name = each.tar, each.key
            if name not in self.bad:
                self.bad[name] = each
                self.new += name not in self.past.counted
                if name not in self.past.reported:
                    self._report(each, then)
        number, of = self.past.bad + self.new, self.past.read + self.read
        if bad and number > self.most * max(of, FIRST):
            raise UserError(
                f"{number:.0f} of the first {of:.0f} samples cannot be used, more than "
                f"data.max_bad={self.most:g} allows: "
                + "; ".join(str(each) for each in list(self.bad.values())[:NAMED])
                + f". {REMEDY}"
            )

    def _report(self, bad: BadSample, then: str) -> None:
        self.reported += 1
        if self.reported <= LOGGED:
            more = ""
            if self.reported == LOGGED:
                more = f"; more are only listed in {self.file}" if self.file else "; more follow"
            log.warning("%s; %s%s", bad, then, more)
        if self.file and self.losses:
            try:
                self.file.parent.mkdir(parents=True, exist_ok=True)
                append_line(self.file, mask_values(dataclasses.asdict(bad)))
                self.losses.worked()
            except OSError as error:
                self.losses.failed(error)


def names_of(folder: Path, counted: Mapping[str, int]) -> tuple[Names, Names]:
    """The samples in the files of bad_samples/: those in the first `counted` lines of each file,
    {name: lines}, and all. Damaged lines and other files are left out."""
    first: Names = set()
    every: Names = set()
    for path in sorted(folder.glob("rank*.jsonl")):
        unread = 0
        try:
            for number, line in enumerate(lines(path)):
                row = parse(line) or {}
                name = row.get("tar"), row.get("key")
                if not all(isinstance(part, str) for part in name):
                    unread += 1
                    continue
                every.add(name)  # type: ignore[arg-type]
                if number < counted.get(path.name, 0):
                    first.add(name)  # type: ignore[arg-type]
        except OSError as error:
            log.warning("%s: cannot be read (%s)", path, error.strerror)
        if unread:
            log.warning("%s: %d damaged lines are left out", path, unread)
    return first, every


def count_lines(path: Path) -> int:
    """The lines of a file; 0 if there is none or it cannot be read."""
    try:
        return sum(1 for _ in lines(path))
    except OSError:
        return 0
