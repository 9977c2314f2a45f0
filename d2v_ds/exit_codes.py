"""The exit codes of both commands, and the tables that `--help` prints.

slurm/common.sh repeats the codes that it handles; a test compares them.
"""

from __future__ import annotations

from collections.abc import Mapping

FINISHED = 0
FAILURE = 1
BAD_INPUT = 2
UNHEALTHY = 3
UNFIT = 4
HUNG = 5
INTERRUPTED = 130

ONE_LINE = "bad input or configuration; one line says what to change"
OF_D2V_DS = {
    FINISHED: "finished, or stopped and saved on request",
    FAILURE: "failed",
    BAD_INPUT: ONE_LINE,
    UNHEALTHY: "a health rule stopped the run",
    UNFIT: "some nodes are unfit; the message names them",
    HUNG: "a rank hung; its stack traces are in the run folder",
    INTERRUPTED: "interrupted with Ctrl-C before training began",
}
OF_D2V_SHARDS = {
    FINISHED: "finished",
    FAILURE: "failed; verify: problems were found",
    BAD_INPUT: ONE_LINE,
    INTERRUPTED: "interrupted with Ctrl-C; run the same command to resume",
}


def table(meanings: Mapping[int, str]) -> str:
    """The end of --help."""
    return "exit codes:\n" + "\n".join(f"  {code:<5}{text}" for code, text in meanings.items())
