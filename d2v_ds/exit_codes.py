"""The exit codes of both commands, and the table that `--help` prints.

slurm/common.sh repeats the codes that it handles; a test compares them.
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
    UNFIT: "some nodes are unfit; the message names them",
    HUNG: "a rank hung; its stack traces are in the run folder",
    INTERRUPTED: "conversion interrupted with Ctrl-C; run the same command to resume",
}


def table() -> str:
    """The epilog of --help."""
    return "exit codes:\n" + "\n".join(f"  {code:<5}{text}" for code, text in MEANING.items())
