"""Files of TensorBoard events, written so that a run survives a full disk and a clock that is set.

    scalars, texts, pictures --EventFile--> FOLDER/events.out.tfevents.TIME.HOST.PID.NUMBER

Each record is written at once and whole, or not at all. TensorBoard reads the files of a folder in
the order of their names, so a new file gets a name after all others, whatever the clock says.
"""

from __future__ import annotations

import itertools
import os
import re
import socket
import time
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from d2v_ds.records import Losses, append

NAME = re.compile(r"events\.out\.tfevents\.([0-9]{1,12})\..*")
_numbers = itertools.count()


class Clock:
    """Seconds since 1970 that never decrease: at least `after`, and from there on at least as fast
    as a clock that nobody sets."""

    def __init__(self, after: float = 0.0) -> None:
        self._last, self._then = after, time.monotonic()

    def now(self) -> float:
        passed = time.monotonic()
        self._last = max(time.time(), self._last + passed - self._then)
        self._then = passed
        return self._last


class EventFile:
    """One new file of events in a folder, made with the first event. purge: steps from this one on
    in earlier files of the folder are hidden.

    A write that fails is recorded in `losses`, and the next one is tried again.
    """

    def __init__(self, folder: Path, clock: Clock, purge: int | None = None) -> None:
        self.folder, self.clock, self.purge = folder, clock, purge
        self.losses = Losses(folder, "events")
        self._file: IO[bytes] | None = None

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        from torch.utils.tensorboard.summary import scalar

        summaries = [scalar(t, value) for t, value in values.items()]  # type: ignore[no-untyped-call]
        self._write(summaries, step)

    def text(self, tag: str, text: str, step: int) -> None:
        """`text` unchanged, in a fixed-width font."""
        from torch.utils.tensorboard.summary import text as as_text

        block = "".join(f"    {line}\n" for line in text.splitlines())
        self._write([as_text(tag, block)], step)  # type: ignore[no-untyped-call]

    def image(self, tag: str, picture: npt.NDArray[np.uint8], step: int) -> None:
        """picture: [height, width, 3]."""
        from torch.utils.tensorboard.summary import image

        summary = image(tag, picture, dataformats="HWC")  # type: ignore[no-untyped-call]
        self._write([summary], step)

    def _write(self, summaries: list[Any], step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event  # type: ignore[import-untyped]

        now = self.clock.now()
        records = [record(Event(wall_time=now, step=step, summary=one)) for one in summaries]
        try:
            if self._file is None:
                self._file = self._open(now)
            append(self._file, b"".join(records))
            self.losses.worked()
        except OSError as error:
            self.losses.failed(error, len(records))

    def _open(self, now: float) -> IO[bytes]:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        self.folder.mkdir(parents=True, exist_ok=True)
        stamps = [int(found[1]) for name in os.listdir(self.folder) if (found := NAME.match(name))]
        stamp = max([int(now), *(1 + stamp for stamp in stamps)])
        name = f"{stamp:010d}.{socket.gethostname()}.{os.getpid()}.{next(_numbers)}"
        head = [Event(wall_time=now, file_version="brain.Event:2")]
        if self.purge is not None:
            start = SessionLog(status=SessionLog.START)
            head.append(Event(wall_time=now, step=self.purge, session_log=start))
        path = self.folder / f"events.out.tfevents.{name}"
        file = path.open("xb", buffering=0)
        try:
            append(file, b"".join(map(record, head)))
        except OSError:
            file.close()
            path.unlink(missing_ok=True)
            raise
        return file

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def record(event: Any) -> bytes:
    """An event with its length and checksums."""
    from tensorboard.summary.writer import record_writer  # type: ignore[import-untyped]

    framed = BytesIO()
    record_writer.RecordWriter(framed).write(event.SerializeToString())
    return framed.getvalue()
