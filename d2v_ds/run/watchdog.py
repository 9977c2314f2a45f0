"""A thread of every rank that reports whether the rank makes progress, and where it hangs.

    mark(phase, step), called by training --> heartbeat/rankNNNNN.json, every few seconds
    no mark for D2V_HANG_SECONDS on any rank --> logs/JOB.RESTART/hung, which names the rank
        --> every rank's stack traces in logs/JOB.RESTART/stacks-rankNNNNN.txt --> exit code 5
    a newer start of the run --> exit code 1, before anything else is written

The batch script also asks for stack traces, by writing `hung` itself, if a rank stops sending
heartbeats (a stopped process, a lost node). Without D2V_HANG_SECONDS no process is terminated
for hanging, because someone may be using a debugger.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import logging
import os
import sys
import threading
import time
from typing import IO

from d2v_ds.errors import Superseded
from d2v_ds.exit_codes import FAILURE, HUNG
from d2v_ds.run.environment import node_name
from d2v_ds.run.heartbeat import Heartbeat, beat, duration, heartbeats
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
        if not self._stacks_path.stat().st_size:
            self._stacks_path.unlink()

    def start(self, run: RunFolder, generation: Generation) -> None:
        """Begins to write this rank's heartbeats and stack traces into the run folder."""
        self.run, self.generation = run, generation
        logs = run.logs(generation)
        logs.mkdir(parents=True, exist_ok=True)
        self._hung = logs / "hung"
        self._stacks_path = logs / f"stacks-rank{self.rank:05d}.txt"
        self._stacks: IO[str] = self._stacks_path.open("w")
        self._dumped = 0.0
        self.mark("starting", 0)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def mark(self, phase: str, step: int) -> None:
        """Training made progress: it enters `phase` and has taken `step` steps. Cheap."""
        # Others read from the file whether this rank is saving.
        urgent = "saving" in (phase, self._beat.phase)
        self._beat = dataclasses.replace(self._beat, phase=phase, step=step, since=time.time())
        if urgent:
            self._wake.set()

    def pace(self, busy_seconds: float, wait_seconds: float) -> None:
        """The time of a step on this rank, for `d2v-ds status`."""
        self._beat = dataclasses.replace(
            self._beat, busy_seconds=busy_seconds, wait_seconds=wait_seconds
        )

    # ------------------------------------------------------------------------- in the thread

    def _watch(self) -> None:
        armed = 0.0  # the mark that faulthandler's own thread, which needs no GIL, waits for
        while not self._closed:
            since = self._beat.since
            if self.limit and since != armed:
                later = self.limit + 2 * self.interval
                faulthandler.dump_traceback_later(later, file=self._stacks)
                armed = since
            try:
                self._look()
            except Superseded as error:
                self._leave(FAILURE, str(error))
            except OSError as error:  # a temporary file-system error is no reason to end a run
                log.warning("heartbeat: %s", error)
            self._wake.wait(self.interval)
            self._wake.clear()
        self._write_beat()

    def _look(self) -> None:
        refuse_superseded(self.run, self.generation)
        self._write_beat()
        now = time.time()
        if self._hangs(now) and not self._hung.exists():
            self._record_hang(describe_hang(heartbeats(self.run), self.ranks, now, self.interval))
        if not self._hung.exists():
            return
        if not self._dumped:
            self._dumped = now
            faulthandler.dump_traceback(self._stacks, all_threads=True)
            log.error("stack traces of all threads are in %s", self._stacks_path)
        elif now - self._dumped > SILENT_BEATS * self.interval:  # the others have written theirs
            self._leave(HUNG)

    def _hangs(self, now: float) -> bool:
        if not self.limit or self._beat.phase == PATIENT:
            return False
        return now - self._beat.since > self.limit

    def _write_beat(self) -> None:
        beat(self.run, dataclasses.replace(self._beat, time=time.time()))

    def _record_hang(self, text: str) -> None:
        """Records which rank hangs. The first rank that detects it does this for all."""
        try:
            with self._hung.open("x") as file:
                file.write(text + "\n")
        except FileExistsError:
            return
        self._say(text)

    def _leave(self, code: int, text: str = "") -> None:
        """Ends the process immediately, regardless of the state of its main thread."""
        if text:
            self._say(text)
        for handler in log.handlers:
            handler.flush()
        os._exit(code)

    def _say(self, text: str) -> None:
        log.error("%s", text)
        print(f"d2v-ds: {text}", file=sys.stderr, flush=True)


def describe_hang(beats: list[Heartbeat], ranks: int, now: float, interval: float) -> str:
    """One line: which rank hangs, where, and since when."""
    missing = sorted(set(range(ranks)) - {b.rank for b in beats})
    if missing:
        return f"hanging: no heartbeat was ever received from rank {', '.join(map(str, missing))}"
    silent = [b for b in beats if now - b.time > SILENT_BEATS * interval]
    if silent:
        return "hanging: " + "; ".join(
            f"rank {b.rank} on {b.host} has been silent for {duration(now - b.time)}, last in "
            f"{b.phase!r} after step {b.step}"
            for b in silent
        )
    first = min(beats, key=lambda b: (b.step, b.since))
    return (
        f"hanging: rank {first.rank} on {first.host} has been in {first.phase!r} after step "
        f"{first.step} for {duration(now - first.since)}, longer than any other rank"
    )
