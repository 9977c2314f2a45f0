"""Every parser, on a part of the inputs that `make fuzz` runs."""

from __future__ import annotations

import os
import time
from pathlib import Path
from random import Random

import pytest

from tests.fuzz import harness
from tests.fuzz.harness import Target, input_of, run
from tests.fuzz.mutations import any_bytes
from tests.fuzz.targets import TARGETS

FEW, MANY = 100, 2_000  # inputs of each parser


@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("inputs", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", TARGETS)
def test_no_faults(name: str, inputs: int) -> None:
    result = run(TARGETS[name], inputs)
    assert not result.findings
    refuses = bool(TARGETS[name].documented)  # damage of a log is no error
    assert result.inputs == inputs and (result.outcomes[harness.REFUSED] > 0) == refuses


def test_every_fault_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A parser that fails in all ways that the harness knows."""

    def parse(data: bytes, folder: Path) -> object:
        match data[:1]:
            case b"a":
                raise ValueError("documented")
            case b"b":
                raise KeyError("not documented")
            case b"c":
                time.sleep(1e6)
            case b"d":
                os.kill(os.getpid(), 11)
            case b"e":
                return bytearray(4 * harness.MEMORY)
            case b"f":
                return "other content"
        return "sound"

    def mutate(data: bytes, rng: Random) -> bytes:
        return rng.choice([b"a", b"b", b"c", b"d", b"e", b"f", b"g"])

    monkeypatch.setattr(harness, "SECONDS", 0.5)
    target = Target("broken", lambda folder: [b"g"], parse, mutate, (ValueError,), protected=True)
    result = run(target, 40)
    kinds = {signature.partition(" in ")[0] for signature in result.findings}
    assert kinds == {
        "KeyError", "hang", "the process ended (SIGSEGV)", "MemoryError", "damage is accepted",
    }  # fmt: skip
    assert result.inputs == 40 and result.outcomes.keys() == {"refused", "accepted", "fault"}


def test_inputs_are_reproducible() -> None:
    target = Target(
        "t", lambda folder: [b"abcdef"], lambda data, folder: data, any_bytes, (), False
    )
    inputs = [input_of(target, [b"abcdef"], 0, number) for number in range(50)]
    assert inputs == [input_of(target, [b"abcdef"], 0, number) for number in range(50)]
    assert len(set(inputs)) > 40
