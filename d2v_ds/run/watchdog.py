"""A thread of every rank that reports whether the rank makes progress, and where it hangs.

    mark(phase, step), called by training --> heartbeat/rankNNNNN.json, every few seconds
    no mark for D2V_HANG_SECONDS on any rank --> logs/JOB.RESTART/hung, which names the rank
        --> every rank's stack traces in logs/JOB.RESTART/stacks-rankNNNNN.txt --> exit code 5
    a newer start of the run --> exit code 1, before anything else is written

The batch script also asks for stack traces, by writing `hung` itself, if a rank stops sending
heartbeats (a stopped process, a lost node). Without D2V_HANG_SECONDS no process is terminated
for hanging, because someone may be using a debugger.

Durations are measured with a monotonic clock, without the time in which this process was stopped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import logging
import os
import threading
import time
from collections.abc import Mapping
from typing import IO

from d2v_ds.errors import Superseded
from d2v_ds.exit_codes import FAILURE, HUNG
from d2v_ds.records import Losses
from d2v_ds.run.environment import node_name
from d2v_ds.run.heartbeat import ENDED, Heartbeat, beat, duration, heartbeats
from d2v_ds.run.logs import say
from d2v_ds.run.run_folder import Generation, RunFolder, refuse_superseded

log = logging.getLogger("d2v_ds")

INTERVAL = 5.0  # seconds between heartbeats, at most
PATIENT = "waiting for shards"  # the phase without a time limit: other nodes copy their shards
SILENT_BEATS = 4  # consecutive heartbeats missed after which a rank is reported as silent


class Watchdog:
    """Watches the thread that calls `mark`. A context manager; `start` begins watching.

    limit: seconds without a mark that count as hanging; None: D2V_HANG_SECONDS, if it is set.
    """

    def __init__(self, rank: int, ranks: int, limit: float | None = None) -> None:
        self.rank, self.ranks = rank, ranks
        self.limit = limit or float(os.environ.get("D2V_HANG_SECONDS", "0")) or None
        self.interval = min(INTERVAL, self.limit / 10) if self.limit else INTERVAL
        self._beat = Heartbeat(rank, node_name(), 0, "starting", time.time(), 0.0)
        self._marked = time.monotonic()
        self._stopped = (0.0, 0.0)  # a mark, and the seconds after it in which nothing ran
        self._looked: tuple[float, dict[int, int]] | None = None  # when, and {rank: its count}
        self._dumped = 0.0
        self._count = 0
        self._losses: Losses | None = None
        self._wake = threading.Event()
        self._closed = False
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Watchdog:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._thread is None:
            return
        self._closed = True
        self._wake.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        self._stacks.close()
        with contextlib.suppress(OSError):
            if not self._stacks_path.stat().st_size:
                self._stacks_path.unlink()

    def start(self, run: RunFolder, generation: Generation) -> None:
        """Begins to write this rank's heartbeats and stack traces into the run folder."""
        self.run, self.generation = run, generation
        self._beat = dataclasses.replace(self._beat, generation=generation.number)
        self._losses = Losses(run.heartbeat, "heartbeats")
        logs = run.logs(generation)
        self._hung = logs / "hung"
        self._stacks_path = logs / f"stacks-rank{self.rank:05d}.txt"
        self._stacks: IO[str]
        try:
            logs.mkdir(parents=True, exist_ok=True)
            self._stacks = self._stacks_path.open("w")
        except OSError as error:
            log.warning("%s: stack traces cannot be written (%s)", self._stacks_path, error)
            self._stacks = open(os.devnull, "w")
        self.mark("starting", 0)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def mark(self, phase: str, step: int) -> None:
        """Training made progress: it enters `phase` and has taken `step` steps. Cheap."""
        # Others read from the file whether this rank is saving.
        urgent = "saving" in (phase, self._beat.phase)
        self._beat = dataclasses.replace(self._beat, phase=phase, step=step, since=time.time())
        self._marked = time.monotonic()
        if urgent:
            self._wake.set()

    def pace(self, busy_seconds: float, wait_seconds: float) -> None:
        """The time of a step on this rank, for `d2v-ds status`."""
        self._beat = dataclasses.replace(
            self._beat, busy_seconds=busy_seconds, wait_seconds=wait_seconds
        )

    def lost(self, rows: int) -> None:
        """The number of rows of metrics that could not be written, for `d2v-ds status`."""
        if rows != self._beat.lost:
            self._beat = dataclasses.replace(self._beat, lost=rows)

    def ended(self, reason: str) -> None:
        """This rank ends with an error, which `d2v-ds status` shows."""
        self._beat = dataclasses.replace(
            self._beat, phase=ENDED, reason=reason[:2000], since=time.time()
        )
        self._marked = time.monotonic()

    # ------------------------------------------------------------------------- in the thread

    def _watch(self) -> None:
        armed = (0.0, 0.0)  # for which faulthandler's own thread, which needs no GIL, waits
        while not self._closed:
            since = self._marked, self._stopped[1]
            if self.limit and since != armed:
                later = self.limit + 2 * self.interval
                faulthandler.dump_traceback_later(later, file=self._stacks)
                armed = since
            try:
                self._look()
            except Superseded as error:
                self._leave(FAILURE, str(error))
            except OSError as error:  # a temporary file-system error is no reason to end a run
                log.warning("%s", error)
            began = time.monotonic()
            self._wake.wait(self.interval)
            self._wake.clear()
            self._leave_out(time.monotonic() - began - self.interval)
        with contextlib.suppress(Superseded):
            refuse_superseded(self.run, self.generation)
            self._write_beat()

    def _leave_out(self, late: float) -> None:
        """A thread that wakes up late was stopped, as in a suspended job: the time does not count.
        If the interpreter was held by another thread instead, faulthandler reports it."""
        if late > self.interval:
            mark, seconds = self._stopped
            self._stopped = self._marked, late + (seconds if mark == self._marked else 0.0)
            self._looked = None

    def _phase_seconds(self) -> float:
        marked, (mark, seconds) = self._marked, self._stopped
        return time.monotonic() - marked - (seconds if mark == marked else 0.0)

    def _look(self) -> None:
        refuse_superseded(self.run, self.generation)
        self._write_beat()
        if not self._hung.exists() and self._hangs():
            self._find_the_cause()
        if not self._hung.exists():
            return
        now = time.monotonic()
        if not self._dumped:
            self._dumped = now
            faulthandler.dump_traceback(self._stacks, all_threads=True)
            log.error("stack traces of all threads are in %s", self._stacks_path)
        elif now - self._dumped > SILENT_BEATS * self.interval:  # the others have written theirs
            self.ended(self._why())
            self._write_beat()
            self._leave(HUNG)

    def _hangs(self) -> bool:
        if not self.limit or self._beat.phase == PATIENT or self._phase_seconds() <= self.limit:
            self._looked = None
            return False
        return True

    def _find_the_cause(self) -> None:
        """Observes the heartbeats of all ranks for a while, then records which rank hangs."""
        beats, now = heartbeats(self.run), time.monotonic()
        if self._looked is None:
            self._looked = now, {one.rank: one.count for one in beats}
            return
        began, counts = self._looked
        if now - began <= SILENT_BEATS * self.interval:
            return
        silent = {one.rank: now - began for one in beats if counts.get(one.rank) == one.count}
        self._record_hang(describe_hang(beats, self.ranks, silent))

    def _write_beat(self) -> None:
        assert self._losses is not None
        self._count += 1  # not in self._beat, which the other thread replaces
        now = dataclasses.replace(
            self._beat,
            time=time.time(),
            count=self._count,
            phase_seconds=max(0.0, self._phase_seconds()),
        )
        try:
            beat(self.run, now)
            self._losses.worked()
        except OSError as error:
            self._losses.failed(error)

    def _why(self) -> str:
        """The text of `hung`, which this rank, another one or the batch script has written."""
        try:
            return self._hung.read_text(errors="replace").strip() or "a rank hung"
        except OSError:
            return "a rank hung"

    def _record_hang(self, text: str) -> None:
        """Records which rank hangs. The first rank that detects it does this for all."""
        try:
            with self._hung.open("x") as file:
                self._say(text)
                file.write(text + "\n")
        except FileExistsError:
            return
        except OSError as error:
            log.error("%s: cannot be written (%s)", self._hung, error)

    def _leave(self, code: int, text: str = "") -> None:
        """Ends the process immediately, regardless of the state of its main thread."""
        try:
            if text:
                self._say(text)
            for handler in log.handlers:
                handler.flush()
        finally:
            os._exit(code)

    def _say(self, text: str) -> None:
        log.error("%s", text)
        say(f"d2v-ds: {text}")


def describe_hang(beats: list[Heartbeat], ranks: int, silent: Mapping[int, float]) -> str:
    """One line: which rank hangs, and where. silent: {rank: seconds} of ranks that send nothing
    although they were watched for so long."""
    missing = sorted(set(range(ranks)) - {b.rank for b in beats})
    if missing:
        return f"hanging: no heartbeat was ever received from rank {', '.join(map(str, missing))}"
    if silent:
        return "hanging: " + "; ".join(
            f"rank {b.rank} on {b.host} has been silent for more than "
            f"{duration(silent[b.rank])}, last in {b.phase!r} after step {b.step}"
            for b in beats
            if b.rank in silent
        )
    first = min(beats, key=lambda b: (b.step, -b.phase_seconds))
    return (
        f"hanging: rank {first.rank} on {first.host} has been in {first.phase!r} after step "
        f"{first.step} for {duration(first.phase_seconds)}, longer than any other rank"
    )
