"""Files that processes of a node share: complete, within a size; and folders of one process."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from d2v_ds.data.cache.folder import Cache, OwnFolder, added, remove_unused
from d2v_ds.data.cache.private import writing
from d2v_ds.errors import UserError
from tests.helpers.runs import environment


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cache:
    monkeypatch.setenv("D2V_CACHE", str(tmp_path / "cache"))
    return Cache.from_environment()


def test_settings_of_the_cache(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"12": 12, "3KB": 3000, "2 GB": 2 * 10**9, "80G": 80 * 10**9, "1.5GB": 15 * 10**8}
    for text, expected in {**sizes, "80GiB": 80 << 30}.items():
        monkeypatch.setenv("D2V_CACHE_BYTES", text)
        assert Cache.from_environment().limit == expected
    monkeypatch.setenv("D2V_CACHE_BYTES", "many")
    with pytest.raises(UserError, match="D2V_CACHE_BYTES: 'many' is not a size"):
        Cache.from_environment()


def test_the_default_cache_belongs_to_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("D2V_CACHE", "D2V_CACHE_BYTES"):
        monkeypatch.delenv(name, raising=False)
    found = Cache.from_environment()
    assert found.folder.name == f"d2v_ds-{os.getuid()}" and found.limit == 200 * 10**9


def test_errors_of_the_disk_name_the_variable(tmp_path: Path) -> None:
    for variable in ("D2V_CACHE", "D2V_STAGE"):
        with (
            pytest.raises(UserError, match=rf"{variable}: cannot write {tmp_path} \(.*Is a dire"),
            writing(tmp_path, variable),
        ):
            tmp_path.read_bytes()


def test_a_file_gets_its_name_only_when_complete(tmp_path: Path) -> None:
    path, temporary = tmp_path / "a.idx", tmp_path / "a.idx.tmp"
    temporary.write_bytes(b"of a killed process, and longer")
    with added(path) as file:
        file.write(b"content")
        assert temporary.exists() and not path.exists()
        with temporary.open() as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_SH | fcntl.LOCK_NB)
    assert path.read_bytes() == b"content" and not temporary.exists()
    with pytest.raises(KeyboardInterrupt), added(tmp_path / "b") as file:
        file.write(b"content")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == [path]


def test_room_is_reserved_while_a_shard_is_written(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    cache = Cache(tmp_path, 100)
    for number, name in enumerate(("old.tar", "new.tar")):
        (folder / name).write_bytes(bytes(30))
        os.utime(folder / name, (number, number))
    with cache.added(folder / "first.tar", 60) as file:
        assert not (folder / "old.tar").exists() and (folder / "new.tar").exists()
        assert (folder / "first.tar.tmp").stat().st_size == 60
        file.write(bytes(60))
        with cache.added(folder / "second.tar", 40) as other:
            other.write(bytes(40))
            assert not (folder / "new.tar").exists()
    assert sorted(os.listdir(folder)) == ["first.tar", "second.tar"]


def test_locked_files_are_not_removed(tmp_path: Path) -> None:
    file, folder = tmp_path / "file", tmp_path / "folder"
    file.touch()
    folder.mkdir()
    (folder / "file").touch()
    for path in (file, folder):
        opened = os.open(path, os.O_RDONLY)
        fcntl.flock(opened, fcntl.LOCK_SH)
        assert not remove_unused(path) and path.exists()
        os.close(opened)
        assert remove_unused(path) and not path.exists()
        assert not remove_unused(path), "it was already removed"


def test_the_folder_of_a_killed_process_is_removed(cache: Cache) -> None:
    code = (
        "import os; from d2v_ds.data.cache.folder import OwnFolder; f = OwnFolder();"
        "(f.path / 'a.tar').touch(); print(f.path, flush=True); os.kill(os.getpid(), 9)"
    )
    killed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment()
    )
    assert killed.returncode == -signal.SIGKILL
    left = Path(killed.stdout.strip())
    assert left.parent == cache.folder / "own" and (left / "a.tar").exists()
    first, second = OwnFolder(), OwnFolder()
    assert not left.exists() and first.path.exists()
    first.close()
    assert second.path.exists() and not first.path.exists()
    second.close()
