"""Downloads: which errors are retried, and for how long."""

from __future__ import annotations

import errno
import io
import time
from pathlib import Path

import pytest

from d2v_ds.data import answer, download
from d2v_ds.errors import UserError


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("TRY_FOR", 0.4), ("LONG", 0.2), ("PAUSE", 0.02)):
        monkeypatch.setattr(download, name, seconds)


class Line:
    """Fails `breaks` times, each time after `after` seconds."""

    def __init__(self, breaks: int, after: float, error: OSError) -> None:
        self.left, self.after, self.error = breaks, after, error

    def __call__(self) -> str:
        time.sleep(self.after)
        self.left -= 1
        if self.left >= 0:
            raise self.error
        return "whole"


def test_an_outage_is_retried_for_a_limited_time() -> None:
    reset = ConnectionResetError("reset")
    assert download.try_again(Line(3, 0.0, reset), "u") == "whole"
    start = time.monotonic()
    with pytest.raises(UserError, match=r"u: the download failed \(reset\)"):
        download.try_again(Line(1000, 0.0, reset), "u")
    assert 0.2 < time.monotonic() - start < 5.0


def test_the_time_before_an_outage_does_not_count() -> None:
    """The total exceeds TRY_FOR three times, but each failure starts a new outage."""
    assert download.try_again(Line(4, 0.3, ConnectionResetError("reset")), "u") == "whole"


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "full"), PermissionError(errno.EACCES, "no", "/x")]
)
def test_errors_of_the_local_disk_are_raised_immediately(error: OSError) -> None:
    line = Line(1000, 0.0, error)
    with pytest.raises(OSError) as caught:
        download.try_again(line, "u")
    assert caught.value is error and line.left == 999


def test_a_removed_folder_ends_the_retries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a download that runs in the background would go on after its loader was closed."""
    monkeypatch.setattr(download, "TRY_FOR", 60)
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(FileNotFoundError):
        download.download(f"pipe:rm -r {folder}; exit 1", folder / "a.tar")


def test_a_command(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    download.download(f"pipe:cat {tmp_path}/a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == b"12345"
    with pytest.raises(
        UserError, match=r"the download failed \(the command ended with exit code 3"
    ):
        download.download("pipe:echo half; exit 3", tmp_path / "b")
    download.download(
        f"pipe:test -e {tmp_path}/c || {{ touch {tmp_path}/c; exit 1; }}; echo ok", tmp_path / "b"
    )
    assert (tmp_path / "b").read_bytes() == b"ok\n", "remains of the first attempt"


def test_a_command_that_does_not_exist_is_not_retried(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the command was not found on this machine"):
        download.download("pipe:no-such-command-here x", tmp_path / "a")


# ---------------------------------------------------------------------------------------- schemes


def tape(url: str, mode: str, bufsize: int) -> object:
    """A handler for tape:///PATH that reads with a command, like those of webdataset."""
    from webdataset.gopen import gopen_pipe

    return gopen_pipe(f"pipe:cat {url.removeprefix('tape://')} || exit 4", mode, bufsize)


def test_a_scheme_that_only_webdataset_supports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from webdataset.gopen import gopen_schemes

    (tmp_path / "a").write_bytes(b"12345")
    monkeypatch.setitem(gopen_schemes, "tape", tape)
    download.download(f"tape://{tmp_path}/a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == b"12345"
    with pytest.raises(UserError, match=r"tape:///nothing: the download failed \(.*exit (code )?4"):
        download.download("tape:///nothing", tmp_path / "b")


def test_a_registered_scheme_takes_precedence_over_fsspec(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fsspec knows `file` and `memory` as well."""
    from webdataset.gopen import gopen_schemes

    (tmp_path / "a").write_bytes(b"12345")
    assert download.read_all(f"file://{tmp_path}/a", 1000) == b"12345"
    assert answer.registered_schemes() == {}
    monkeypatch.setitem(gopen_schemes, "memory", lambda *given: io.BytesIO(b"own"))
    assert download.read_all("memory://anything", 1000) == b"own"
    assert list(answer.registered_schemes()) == ["memory"]


def test_missing_tools_of_webdataset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match=r"ais://a/b: webdataset cannot read it \(.*'ais'"):
        download.read_all("ais://a/b", 1000)
    monkeypatch.setenv("USE_AIS_FOR", "s3:memory")
    from webdataset.gopen import gopen_ais, gopen_schemes

    monkeypatch.setitem(
        gopen_schemes, "memory", gopen_ais
    )  # webdataset does this when it is imported
    with pytest.raises(UserError, match=r"memory://a/b: webdataset cannot read it \(.*'ais'"):
        download.read_all("memory://a/b", 1000)


def test_errors_of_fsspec_are_retried(monkeypatch: pytest.MonkeyPatch) -> None:
    """The packages behind fsspec have error classes of their own."""
    import fsspec

    class Timeout(Exception):
        pass

    def fail(*given: object) -> None:
        raise Timeout("no answer")

    monkeypatch.setattr(fsspec, "open", fail)
    with pytest.raises(UserError, match=r"x: the download failed \(Timeout: no answer\)"):
        download.try_again(lambda: download.read_all("s3://b/x", 1000), "s3://b/x")


@pytest.mark.parametrize("scheme", ["pipe:", "hangs://"])
def test_a_command_with_too_much_output_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    from webdataset.gopen import gopen_pipe, gopen_schemes

    command = "yes"
    monkeypatch.setitem(
        gopen_schemes, "hangs", lambda url, mode, bufsize: gopen_pipe(f"pipe:{command}", mode)
    )
    start = time.monotonic()
    with (tmp_path / "b").open("wb") as file, pytest.raises(EOFError, match="more than 2 bytes"):
        download.fetch(f"{scheme}{command}" if scheme == "pipe:" else "hangs://a", file, 2)
    assert time.monotonic() - start < 20
