"""The exit codes of both commands, and the table that `--help` prints.

slurm/common.sh repeats those it acts on; a test compares.
"""

from __future__ import annotations

FINISHED = 0
FAILURE = 1
BAD_INPUT = 2
UNHEALTHY = 3
UNFIT = 4
HUNG = 5
INTERRUPTED = 130

MEANING = {
    FINISHED: "finished, or stopped and saved on request",
    FAILURE: "failed; verify: problems were found",
    BAD_INPUT: "bad input or configuration; one line says what to change",
    UNHEALTHY: "a health rule stopped the run",
    UNFIT: "some nodes cannot take part; they are named",
    HUNG: "a rank hung; its stack traces are in the run folder",
    INTERRUPTED: "interrupted with Ctrl-C while converting; the same command continues",
}


def table() -> str:
    """The epilog of --help."""
    return "exit codes:\n" + "\n".join(f"  {code:<5}{text}" for code, text in MEANING.items())
