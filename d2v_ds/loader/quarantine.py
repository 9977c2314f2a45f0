"""The samples of a run that cannot be used: told once each, and few.

Made.bad --add--> log, RUN/bad_samples/rankNNNNN.jsonl; too many of them end the run
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Sequence
from pathlib import Path

from d2v_ds.errors import UserError
from d2v_ds.loader.reading import REMEDY, Bad

log = logging.getLogger("d2v_ds")

MAX_BAD = 0.001  # share of samples that cannot be used, above which a run ends
FIRST = 1_000  # samples: the share is never taken of fewer
NAMED = 3  # of the bad ones, where they are too many
LOGGED = 20  # of them, before only the file tells
STAND_IN = "another sample stands in for it"


class Quarantine:
    """Of one rank. file: a line of JSON for each bad sample is added to it; None: nowhere. most:
    the share of bad ones among the samples read."""

    def __init__(self, file: Path | None = None, most: float = MAX_BAD) -> None:
        self.file, self.most = file, most
        self.read = 0
        self.bad: dict[tuple[str, str], Bad] = {}  # by tar and key

    def add(self, read: int, bad: Sequence[Bad], then: str = STAND_IN) -> None:
        """After `read` more samples of which these were bad, again or for the first time. then:
        what becomes of them. Raises UserError when they have become too many."""
        self.read += read
        for each in bad:
            if (each.tar, each.key) not in self.bad:
                self.bad[each.tar, each.key] = each
                self._tell(each, then)
        if bad and len(self.bad) > self.most * max(self.read, FIRST):
            raise UserError(
                f"{len(self.bad)} of the first {self.read} samples cannot be used, more than "
                f"data.max_bad={self.most:g} allows: "
                + "; ".join(str(each) for each in list(self.bad.values())[:NAMED])
                + f". {REMEDY}"
            )

    def _tell(self, bad: Bad, then: str) -> None:
        if len(self.bad) <= LOGGED:
            more = "" if len(self.bad) < LOGGED else f"; of more, {self.file or 'nothing'} tells"
            log.warning("%s; %s%s", bad, then, more)
        if self.file:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(dataclasses.asdict(bad), ensure_ascii=False) + "\n")
