"""The bad samples of a run: each is reported once, and too many of them end the run.

Made.bad --add--> log, RUN/bad_samples/rankNNNNN.jsonl
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Sequence
from pathlib import Path

from d2v_ds.errors import UserError
from d2v_ds.loader.reading import REMEDY, BadSample
from d2v_ds.secrets import mask_values

log = logging.getLogger("d2v_ds")

MAX_BAD = 0.001  # share of bad samples above which a run ends
FIRST = 1_000  # the share is relative to at least this many samples
NAMED = 3  # bad samples that the error names
LOGGED = 20  # bad samples that are logged; later ones are only written to the file
REPLACED = "it is replaced by another sample"


class Quarantine:
    """The bad samples of one rank. file: gets a line of JSON for each; None: no file. most: the
    largest allowed share of the samples read."""

    def __init__(self, file: Path | None = None, most: float = MAX_BAD) -> None:
        self.file, self.most = file, most
        self.read = 0
        self.bad: dict[tuple[str, str], BadSample] = {}  # by tar and key

    def add(self, read: int, bad: Sequence[BadSample], then: str = REPLACED) -> None:
        """Records that of `read` more samples these were bad, whether for the first time or not.
        then: what happens to them. Raises UserError if there are too many."""
        self.read += read
        for each in bad:
            if (each.tar, each.key) not in self.bad:
                self.bad[each.tar, each.key] = each
                self._report(each, then)
        if bad and len(self.bad) > self.most * max(self.read, FIRST):
            raise UserError(
                f"{len(self.bad)} of the first {self.read} samples cannot be used, more than "
                f"data.max_bad={self.most:g} allows: "
                + "; ".join(str(each) for each in list(self.bad.values())[:NAMED])
                + f". {REMEDY}"
            )

    def _report(self, bad: BadSample, then: str) -> None:
        if len(self.bad) <= LOGGED:
            more = ""
            if len(self.bad) == LOGGED:
                more = f"; more are only listed in {self.file}" if self.file else "; more follow"
            log.warning("%s; %s%s", bad, then, more)
        if self.file:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a", encoding="utf-8") as lines:
                lines.write(
                    json.dumps(mask_values(dataclasses.asdict(bad)), ensure_ascii=False) + "\n"
                )
