"""The log of a rank: a full disk costs lines, a closed terminal the console."""

from __future__ import annotations

import logging
import resource
import signal
import subprocess
import sys
from pathlib import Path

from d2v_ds.run.logs import LogFile

CODE = """
import logging, os, sys
from pathlib import Path
from d2v_ds.run import logs
logs.open_standard_streams()
assert all(os.fstat(n) for n in (0, 1, 2))
logs.log_to(Path(sys.argv[1]), console=True)
for number in range(20_000):
    logging.getLogger("d2v_ds").info("line %d", number)
    logs.say(f"said {number}")
logs.close_standard_streams()
"""


def record(text: str) -> logging.LogRecord:
    return logging.LogRecord("d2v_ds", logging.INFO, "", 0, text, (), None)


def test_lines_that_were_lost_are_counted(tmp_path: Path) -> None:
    """The limit of the size of a file stands for a disk without space."""
    file = LogFile(tmp_path / "logs" / "rank00000.txt")
    file.handle(record("one"))
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        size = file.path.stat().st_size + 10
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))
        file.handle(record("two"))
        file.handle(record("three"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, before)
    file.handle(record("four \ud800"))
    file.close()
    lines = file.path.read_text().splitlines()
    assert [line.rpartition("INFO ")[2] for line in lines] == [
        "one",
        "2 messages could not be written here",
        "four \\ud800",
    ]


def test_a_reader_that_goes_away_ends_nothing(tmp_path: Path) -> None:
    for number, streams in enumerate(
        ("2>&1 | head -n 1", ">&- 2>&-", "<&- >&- 2>&-", ">/dev/full")
    ):
        path = tmp_path / f"{number}.txt"
        command = f'"{sys.executable}" -c "$0" "{path}" {streams}'
        done = subprocess.run(
            ["bash", "-o", "pipefail", "-c", command, CODE],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, (streams, done.stderr)
        assert len(path.read_text().splitlines()) == 20_000, streams
        assert "line 19999" in path.read_text() and "said" not in path.read_text()
