"""Local files: writes that leave the old or the new content, locks, hashes, sizes, resources."""

from __future__ import annotations

import fcntl
import hashlib
import io
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2v_ds import files
from d2v_ds.files import (
    copy,
    format_size,
    locked,
    parse_size,
    remove_stale,
    resource,
    sha256,
    temporary,
    write_atomically,
    write_durably,
)

# -------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1", 1),
        ("1500", 1500),
        ("1500B", 1500),
        ("12 b", 12),
        ("256MB", 256 * 10**6),
        ("80G", 80 * 10**9),
        ("80GB", 80 * 10**9),
        ("80GiB", 80 << 30),
        ("80Gi", 80 << 30),
        ("1.5GB", 1_500_000_000),
        ("1.5gib", 3 << 29),
        ("200 GB", 200 * 10**9),
        ("  3KB\n", 3000),
        ("3k", 3000),
        ("2KiB", 2048),
        (".5M", 500_000),
        ("1TB", 10**12),
        ("1TiB", 1 << 40),
        ("0.0009K", 0),
    ],
)
def test_parse_size(text: str, expected: int) -> None:
    if expected:
        assert parse_size(text) == expected == parse_size(text.lower()) == parse_size(text.upper())
    else:
        with pytest.raises(ValueError, match="not a size"):
            parse_size(text)


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", "GB", "many", "0", "0GB", "-5GB", "1.GB", "1,5GB", "1e9", "5 G B", "5PB"),
        *("5GBs", "5 GB of disk", "five", "0x10", "1.2.3GB", "iB", "5iB", "nan", "inf"),
    ],
)
def test_what_is_not_a_size(text: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_size(text)
    assert str(caught.value).startswith(f"{text!r} is not a size; ")
    assert "256MB" in str(caught.value) and "80GiB" in str(caught.value), "examples"


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (999.6, "1 KB"),
        (1000, "1 KB"),
        (1234, "1.23 KB"),
        (999_499, "999 KB"),
        (999_500, "1 MB"),
        (1.5e9, "1.5 GB"),
        (80 << 30, "85.9 GB"),
        (200e9, "200 GB"),
        (999.5e9, "1.00 TB"),
        (1.234e12, "1.23 TB"),
        (4.5e15, "4,500.00 TB"),
    ],
)
def test_format_size(size: float, expected: str) -> None:
    assert format_size(size) == expected


@given(st.integers(1, 10**15))
def test_a_formatted_size_can_be_parsed(size: int) -> None:
    found = parse_size(format_size(size).replace(",", ""))
    assert found == pytest.approx(size, rel=0.006)


# ------------------------------------------------------------------------------------------- writes


def test_temporary_names(tmp_path: Path) -> None:
    name = f"a.json.{socket.gethostname()}.{os.getpid()}.tmp"
    assert temporary(tmp_path / "a.json") == tmp_path / name


@pytest.mark.parametrize("data", ["text ä", b"bytes\x00", ""])
def test_writes(tmp_path: Path, data: str | bytes) -> None:
    raw = data.encode() if isinstance(data, str) else data
    for write in (write_atomically, write_durably):
        path = tmp_path / write.__name__
        path.write_text("old")
        write(path, data)
        assert path.read_bytes() == raw
    assert len(list(tmp_path.iterdir())) == 2, "no temporary file is left"


def test_a_failed_write_leaves_the_old_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a"
    path.write_text("old")

    def fail(descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, "new")
    assert path.read_text() == "old"


WRITER = """
import sys
from pathlib import Path
from d2v_ds.files import write_atomically
print("ready", flush=True)
while True:
    for letter in b"ab":
        write_atomically(Path(sys.argv[1]), bytes([letter]) * 3_000_000)
"""


def test_a_killed_writer_leaves_old_or_new_content(tmp_path: Path) -> None:
    path, rng = tmp_path / "a", random.Random(0)
    for _ in range(6):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout and process.stdout.readline() == "ready\n"
        while not path.exists():
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert path.read_bytes() in (b"a" * 3_000_000, b"b" * 3_000_000)
    remove_stale(tmp_path)
    assert list(tmp_path.iterdir()) == [path]


def test_remove_stale(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    here = socket.gethostname()
    stale = tmp_path / f"a.{here}.{ended.pid}.tmp"
    kept = [
        temporary(tmp_path / "b"),  # of this process
        tmp_path / f"c.{here}.1.tmp",  # of a process that runs
        tmp_path / f"d.other.host.{ended.pid}.tmp",
        tmp_path / f"x{here}.{ended.pid}.tmp",  # of another host, whose name ends with this one
        tmp_path / "e.tmp",
        tmp_path / f"f.{here}.word.tmp",
        tmp_path / "g",
    ]
    for file in (stale, *kept):
        file.touch()
    remove_stale(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted(kept)
    remove_stale(tmp_path, all_hosts=True)
    assert list(tmp_path.iterdir()) == [tmp_path / "g"]
    remove_stale(tmp_path / "nowhere")


# -------------------------------------------------------------------------------------------- locks

HOLDER = """
import sys, time
from pathlib import Path
from d2v_ds.files import locked
with locked(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(60)
"""


def holder(lock: Path) -> subprocess.Popen[str]:
    """A process that holds a lock."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(lock)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout and process.stdout.readline() == "locked\n"
    return process


def is_locked(path: Path) -> bool:
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_a_lock_is_released_at_the_end_and_by_errors(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with locked(lock) as opened:
        assert opened.name == str(lock) and is_locked(lock)
    assert not is_locked(lock)
    with pytest.raises(KeyError), locked(lock):
        raise KeyError
    assert not is_locked(lock)
    with pytest.raises(FileNotFoundError), locked(tmp_path / "nowhere" / "lock"):
        pass


def test_one_process_at_a_time_and_a_killed_one_releases_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "WAITING", 0.02)
    lock = tmp_path / "lock"
    process = holder(lock)
    calls, order = [], []

    def wait() -> None:
        with locked(lock, waiting=lambda: calls.append(0)):
            order.append("locked")

    threads = [threading.Thread(target=wait), threading.Thread(target=lambda: lock_plainly(lock))]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 20
    while len(calls) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(calls) >= 5 and not order and all(thread.is_alive() for thread in threads)
    process.kill()
    process.communicate()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert order == ["locked"]


def lock_plainly(lock: Path) -> None:
    with locked(lock):
        pass


def test_a_free_lock_is_waited_for_once(tmp_path: Path) -> None:
    calls: list[int] = []
    with locked(tmp_path / "lock", waiting=lambda: calls.append(0)):
        assert is_locked(tmp_path / "lock")
    assert len(calls) == 1


# ------------------------------------------------------------------------------- hashes and copies


@pytest.mark.parametrize("size", [0, 1, 10, 11, 25])
def test_hashes_and_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(files, "CHUNK", 10)
    data = os.urandom(size)
    (tmp_path / "a").write_bytes(data)
    assert sha256(tmp_path / "a") == hashlib.sha256(data).hexdigest()
    progress: list[int] = []
    target = io.BytesIO()
    with (tmp_path / "a").open("rb") as source:
        source.read(1)
        assert copy(source, target, progress.append) == hashlib.sha256(data[1:]).hexdigest()
    assert target.getvalue() == data[1:]
    assert progress == [min(end, size - 1) for end in range(10, size + 9, 10)]


def test_progress_can_end_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "CHUNK", 10)
    target = io.BytesIO()

    def at_most_20(found: int) -> None:
        if found > 20:
            raise EOFError

    with pytest.raises(EOFError):
        copy(io.BytesIO(bytes(100)), target, at_most_20)
    assert len(target.getvalue()) == 20


# ---------------------------------------------------------------------------------------- resources


def test_resources() -> None:
    assert resource("slurm").is_dir() and resource("slurm", "common.sh").is_file()
    assert list(resource("ds_configs").glob("*.json"))
    with pytest.raises(FileNotFoundError, match="nowhere/"):
        resource("nowhere")


def test_standard_library_only() -> None:
    code = "import sys, d2v_ds.files; print({'numpy', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_leftovers_of_dead_processes_are_removed(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    here = socket.gethostname()
    dead, live, away = (
        tmp_path / f"speech-000000.tar.{owner}.tmp"
        for owner in (f"{here}.{ended.pid}", f"{here}.{os.getpid()}", f"node7.{ended.pid}")
    )
    for file in (dead, live, away):
        file.write_bytes(b"half")
    remove_stale(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([live, away])
    remove_stale(tmp_path, all_hosts=True)
    assert list(tmp_path.iterdir()) == []
