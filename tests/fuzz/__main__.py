"""`python -m tests.fuzz [TARGET ...]`: a table of the outcomes; exit code 1 if there are faults."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.fuzz.harness import HEAD, input_of, run
from tests.fuzz.targets import TARGETS


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(sorted(TARGETS)))
    parser.add_argument("--inputs", type=int, default=1000, help="per target (default: 1000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--save", type=Path, help="folder for the first input of each fault")
    given = parser.parse_args()
    if unknown := set(given.targets) - TARGETS.keys():
        parser.error(f"no target {', '.join(sorted(unknown))}; there are {', '.join(TARGETS)}")
    print(HEAD, flush=True)
    faults = []
    for name in given.targets or TARGETS:
        result = run(TARGETS[name], given.inputs, given.seed, given.first)
        print(result.row(), flush=True)
        for signature, numbers in result.findings.items():
            faults.append(f"{name}: {len(numbers)} x {signature}; first: input {numbers[0]}")
            if given.save:
                given.save.mkdir(parents=True, exist_ok=True)
                with TemporaryDirectory() as folder:
                    data = input_of(
                        TARGETS[name], TARGETS[name].seeds(Path(folder)), given.seed, numbers[0]
                    )
                (given.save / f"{name}-{numbers[0]}").write_bytes(data)
    print("", *faults, sep="\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
