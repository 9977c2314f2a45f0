"""Downloads: which errors are retried, and for how long."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import socket
import threading
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


# ----------------------------------------------------------------------- silence, sizes, secrets


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer, "SILENCE", 0.3)
    monkeypatch.setattr(download, "LONG", 0.6)


def running(marker: str) -> list[str]:
    """Command lines of processes of this machine that contain a text."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            line = file.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if marker in line and int(file.parent.name) != os.getpid():
                found.append(line)
    return found


@pytest.mark.parametrize(
    "command",
    [
        "sleep 7{}", "echo half; sleep 7{}", "sleep 7{} | cat", "(sleep 7{} &) ; exit 0",
        "echo all; exec >/dev/null; sleep 7{}",
    ],
)  # fmt: skip
def test_a_silent_command_is_given_up(tmp_path: Path, short: None, command: str) -> None:
    """It is killed with its children, and retried like other temporary errors."""
    marker = f"7{os.getpid()}{abs(hash(command)) % 10_000}"  # seconds of sleep, which name it
    with pytest.raises(
        UserError, match=r"the download failed \((it sent nothing for|the command sent all, but)"
    ):
        download.download(f"pipe:{command.replace('7{}', marker)}", tmp_path / "a")
    deadline = time.monotonic() + 20  # children that were killed end in their own time
    while running(f"sleep {marker}") and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not running(f"sleep {marker}")


def test_a_slow_command_is_waited_for(tmp_path: Path, short: None) -> None:
    """SILENCE is for each piece, not for the file."""
    download.download("pipe:for i in 1 2 3 4 5 6 7 8; do printf x; sleep 0.1; done", tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == b"x" * 8


@pytest.mark.parametrize("hangs", ["open", "read"])
def test_a_silent_handler_is_given_up(
    monkeypatch: pytest.MonkeyPatch, short: None, hangs: str
) -> None:
    from webdataset.gopen import gopen_schemes

    released = threading.Event()

    class Stream(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            released.wait()
            return b""

    def handler(url: str, mode: str, bufsize: int) -> Stream:
        if hangs == "open":
            released.wait()
        return Stream()

    monkeypatch.setitem(gopen_schemes, "mute", handler)
    with pytest.raises(UserError, match=r"mute://a: the download failed \(it sent nothing for 0.3"):
        download.try_again(lambda: download.read_all("mute://a", 10), "mute://a")
    released.set()


def test_a_server_that_stops_sending(tmp_path: Path, short: None) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    connection.recv(1000)
                    connection.sendall(b"HTTP/1.0 200 OK\r\nContent-Length: 100\r\n\r\nhalf")
                    kept.append(connection)

        kept: list[socket.socket] = []
        threading.Thread(target=serve, daemon=True).start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}/a"
        with pytest.raises(UserError, match=r"/a: the download failed \(.*timed out"):
            download.download(url, tmp_path / "a")
        for connection in kept:
            connection.close()
    assert len(kept) > 1, "it is retried"


def test_a_download_that_always_breaks_off_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "LONG", 0.01)
    line = Line(1000, 0.02, ConnectionResetError("reset"))
    with pytest.raises(UserError, match=r"u: the download failed \(reset\)"):
        download.try_again(line, "u")
    assert 1000 - line.left == download.OUTAGES + 1


def test_a_file_of_a_set_is_not_endless(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has more than 1000 bytes, so it cannot be part of a set"):
        download.read_all("pipe:yes", 1000)
    with (tmp_path / "a").open("wb") as file, pytest.raises(UserError, match="has more than 10 by"):
        download.fetch("pipe:yes", file, most=10)


SECRET = "hunter2hunter2"


@pytest.mark.parametrize(
    "url",
    [
        f"pipe:curl -s -H 'Authorization: Bearer {SECRET}' x://; exit 1",
        f"pipe:false --password {SECRET}",
        f"http://user:{SECRET}@127.0.0.1:9/set/index.json",
        f"http://127.0.0.1:9/set?token={SECRET}",
        f"what://user:{SECRET}@bucket/x",
    ],
)
def test_messages_have_no_secrets(
    url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download.log, "propagate", True)
    with pytest.raises(UserError) as error:
        download.download(url, tmp_path / "a")
    assert SECRET not in str(error.value) + caplog.text and "***" in str(error.value)
    with pytest.raises(UserError) as error:
        download.url_of(url.replace("set", "{}"), "../x")
    assert SECRET not in str(error.value)


def test_odd_answers_of_a_server(tmp_path: Path) -> None:
    for url in ("http://h h/", "http://\x00/", "http://é:x/"):
        with pytest.raises(UserError, match="is not a URL that can be opened"):
            download.download(url, tmp_path / "a")
