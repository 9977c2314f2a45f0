"""Runs a parser on many damaged inputs, in a separate process with limits.

    Target --run--> Result: how many inputs were refused, accepted, and what went wrong

An input goes wrong if the parser raises an error that is not documented, takes too long or too much
memory, ends the process, or accepts damage that its format can detect.
"""

from __future__ import annotations

import faulthandler
import json
import os
import resource
import select
import shutil
import signal
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from tests.fuzz.mutations import Mutate

SECONDS = 20.0  # for one input, after which it counts as a hang; a loaded machine is slow
MEMORY = 1 << 30  # bytes that a parser may take in addition to the process
BROKEN = 86  # exit code of a child in which the harness or the target itself failed
REFUSED, ACCEPTED, CHANGED = "refused", "accepted", "changed"


@dataclass(frozen=True)
class Target:
    """A parser, and inputs that it accepts."""

    name: str
    seeds: Callable[[Path], Sequence[bytes]]  # valid inputs; the folder is the target's own
    parse: Callable[[bytes, Path], Any]  # what the parser makes of an input, comparable with ==
    mutate: Mutate
    documented: tuple[type[BaseException], ...]  # errors with which it refuses an input
    protected: bool  # the format detects damage: an accepted input must give a seed's value


@dataclass
class Result:
    name: str
    inputs: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    findings: dict[str, list[int]] = field(default_factory=dict)  # signature: numbers of the inputs
    seconds: float = 0.0

    def row(self) -> str:
        """A row of the table in Markdown."""
        return (
            f"| {self.name} | {self.inputs:,} | {self.outcomes[REFUSED]:,} | "
            f"{self.outcomes[ACCEPTED]:,} | {self.outcomes[CHANGED]:,} | "
            f"{sum(map(len, self.findings.values())):,} | {self.seconds:.0f} |"
        )


HEAD = (
    "| parser | inputs | refused | accepted, as undamaged | accepted, other content | faults | s |"
    "\n|---|---|---|---|---|---|---|"
)


def input_of(target: Target, seeds: Sequence[bytes], seed: int, number: int) -> bytes:
    """Input `number`: the same for the same seeds of the target."""
    rng = Random(f"{target.name}/{seed}/{number}")
    return target.mutate(rng.choice(seeds), rng)


def run(target: Target, inputs: int, seed: int = 0, first: int = 0) -> Result:
    """Runs `inputs` inputs, from number `first` on."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-", dir=_memory_folder()))
    began = time.monotonic()
    result = Result(target.name)
    try:
        (folder / "seeds").mkdir()
        seeds = target.seeds(folder / "seeds")
        while result.inputs < inputs:
            begin = first + result.inputs
            for number, outcome, signature in _child(
                target, seeds, seed, begin, first + inputs, folder
            ):
                result.inputs += 1
                result.outcomes[outcome] += 1
                if signature:
                    result.findings.setdefault(signature, []).append(number)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    result.seconds = time.monotonic() - began
    return result


def _memory_folder() -> str | None:
    """Thousands of small files are written, to memory if possible."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def _child(
    target: Target, seeds: Sequence[bytes], seed: int, first: int, last: int, folder: Path
) -> Iterator[tuple[int, str, str]]:
    """(number, outcome, signature of a fault) of each input, until the process ends. The input with
    which a process ends, or which takes too long, is its last."""
    reader, writer = os.pipe()
    console = os.dup(2)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.close(reader)
            _work(target, seeds, seed, range(first, last), folder, writer)
            code = 0
        except BaseException:
            os.write(console, traceback.format_exc().encode())
            code = BROKEN
        finally:
            os._exit(code)
    os.close(writer)
    os.close(console)
    number, rest, hangs = first, b"", False
    with os.fdopen(reader, "rb", buffering=0) as pipe:
        pipe.read(1)  # it has parsed the seeds, and imported what that needs
        while True:
            ready, _, _ = select.select([pipe], [], [], SECONDS)
            if not ready:
                hangs = True
                os.kill(pid, signal.SIGKILL)
                break
            chunk = pipe.read(1 << 16)
            if not chunk:
                break
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                number, outcome, signature = json.loads(line)
                yield number, outcome, signature
                number += 1
    _, status = os.waitpid(pid, 0)
    if os.waitstatus_to_exitcode(status) == BROKEN:
        raise RuntimeError(f"{target.name}: the target itself failed, see the traceback")
    if number < last:
        how = "hang" if hangs else f"the process ended ({_ended(status)})"
        yield number, "fault", how


def _ended(status: int) -> str:
    code = os.waitstatus_to_exitcode(status)
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _work(
    target: Target, seeds: Sequence[bytes], seed: int, numbers: range, folder: Path, writer: int
) -> None:
    """In the child: parses the inputs and reports each. Its output is discarded."""
    faulthandler.disable()  # pytest enables it; the parent reports how the process ended
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    work = folder / "work"
    work.mkdir(exist_ok=True)
    sound = [target.parse(one, work) for one in seeds]
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, held + MEMORY))
    os.write(writer, b"+")
    for number in numbers:
        data = input_of(target, seeds, seed, number)
        outcome, signature = _outcome(target, data, sound, work)
        os.write(writer, json.dumps([number, outcome, signature]).encode() + b"\n")


def _outcome(target: Target, data: bytes, sound: Sequence[Any], work: Path) -> tuple[str, str]:
    try:
        value = target.parse(data, work)
    except target.documented:
        return REFUSED, ""
    except BaseException as error:
        return "fault", _signature(error)
    if value in sound:
        return ACCEPTED, ""
    return ("fault", "damage is accepted") if target.protected else (CHANGED, "")


def _signature(error: BaseException) -> str:
    """The type of an error, and the last line of the project that it passed through. `--save` keeps
    an input of each, which shows the message."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if "/d2v_ds/" in f.filename or "/shards/" in f.filename]
    place = (own or frames)[-1]
    return f"{type(error).__name__} in {Path(place.filename).name}:{place.lineno}"
