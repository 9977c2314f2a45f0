"""Files from elsewhere: what is tried again, how long, and what is not."""

from __future__ import annotations

import errno
import time
from pathlib import Path

import pytest

from d2v_ds.data import download
from d2v_ds.errors import UserError


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("TRY_FOR", 0.4), ("SILENCE", 0.1), ("PAUSE", 0.02)):
        monkeypatch.setattr(download, name, seconds)


class Line:
    """Breaks so many times, each after some seconds."""

    def __init__(self, breaks: int, after: float, error: OSError) -> None:
        self.left, self.after, self.error = breaks, after, error

    def __call__(self) -> str:
        time.sleep(self.after)
        self.left -= 1
        if self.left >= 0:
            raise self.error
        return "whole"


def test_an_outage_is_waited_for_but_not_for_ever() -> None:
    reset = ConnectionResetError("reset")
    assert download.try_again(Line(3, 0.0, reset), "u") == "whole"
    start = time.monotonic()
    with pytest.raises(UserError, match=r"u: cannot be downloaded \(reset\)"):
        download.try_again(Line(1000, 0.0, reset), "u")
    assert 0.2 < time.monotonic() - start < 5.0


def test_the_time_before_an_outage_does_not_count() -> None:
    """Three times more than TRY_FOR in all, and each break comes after a stretch that went well."""
    assert download.try_again(Line(4, 0.3, ConnectionResetError("reset")), "u") == "whole"


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "full"), PermissionError(errno.EACCES, "no", "/x")]
)
def test_errors_of_this_machine_are_told_at_once(error: OSError) -> None:
    line = Line(1000, 0.0, error)
    with pytest.raises(OSError) as caught:
        download.try_again(line, "u")
    assert caught.value is error and line.left == 999


def test_a_command(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    download.download(f"pipe:cat {tmp_path}/a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == b"12345"
    with pytest.raises(
        UserError, match=r"cannot be downloaded \(the command ended with exit code 3"
    ):
        download.download("pipe:echo half; exit 3", tmp_path / "b")
    download.download(
        f"pipe:test -e {tmp_path}/c || {{ touch {tmp_path}/c; exit 1; }}; echo ok", tmp_path / "b"
    )
    assert (tmp_path / "b").read_bytes() == b"ok\n", "nothing is left of the first try"
