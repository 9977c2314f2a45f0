"""Folders that only this user can change, although others may write beside them."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

import pytest

from d2v_ds.data.cache import private as module
from d2v_ds.data.cache.folder import Cache, OwnFolder, remove_unused
from d2v_ds.data.cache.private import chosen, own_folder, private
from d2v_ds.errors import UserError
from d2v_ds.files import locked

NOBODY = 65_534
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to act as another user")


@pytest.fixture(autouse=True)
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder like /tmp."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    folder.chmod(0o1777)
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.delenv("D2V_CACHE", raising=False)
    monkeypatch.setattr(module.log, "propagate", True)
    module._tell.cache_clear()
    return folder


def mode(folder: Path) -> int:
    return stat.S_IMODE(folder.stat().st_mode)


def test_the_default_is_a_private_folder(shared: Path) -> None:
    found = Cache.from_environment().folder
    assert found == shared / f"d2v_ds-{os.geteuid()}" and mode(found) == 0o700
    assert Cache.from_environment().folder == found, "jobs of a user share it"


def test_a_link_is_not_followed(
    shared: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (shared / f"d2v_ds-{os.geteuid()}").symlink_to(tmp_path / "elsewhere")
    found = Cache.from_environment().folder
    assert found == shared / f"d2v_ds-{os.geteuid()}-1" == Cache.from_environment().folder
    assert "is a link, not a folder" in caplog.text and "is used instead" in caplog.text
    assert not list((tmp_path / "elsewhere").iterdir())


@needs_root
def test_a_folder_of_another_user_is_not_used(
    shared: Path, caplog: pytest.LogCaptureFixture
) -> None:
    taken = shared / "d2v_ds-0"
    taken.mkdir(mode=0o777)
    os.chown(taken, NOBODY, NOBODY)
    assert Cache.from_environment().folder == shared / "d2v_ds-0-1"
    assert f"d2v_ds-0: belongs to another user (uid {NOBODY})" in caplog.text
    for number in range(1, module.NAMES):
        folder = shared / f"d2v_ds-0-{number}"
        folder.mkdir(exist_ok=True)
        os.chown(folder, NOBODY, NOBODY)
    with pytest.raises(UserError, match="and so do 9 others; set D2V_CACHE to a"):
        Cache.from_environment()


@needs_root
def test_a_set_of_another_user_is_refused(shared: Path) -> None:
    folder = shared / "set"
    folder.mkdir()
    os.chown(folder, NOBODY, NOBODY)
    with pytest.raises(UserError, match="set: belongs to another user"):
        private(folder, "D2V_CACHE")


def test_an_open_folder_is_closed(shared: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As earlier versions made them under umask 002. What others put into it is removed."""
    folder = shared / "set"
    folder.mkdir()
    folder.chmod(0o2775)
    (folder / "own.tar").touch()
    (folder / "link.tar").symlink_to("/etc/passwd")
    if os.geteuid() == 0:
        (folder / "strange.tar").touch()
        os.chown(folder / "strange.tar", NOBODY, NOBODY)
    private(folder, "D2V_CACHE")
    assert mode(folder) & 0o777 == 0o755
    assert os.listdir(folder) == ["own.tar"]
    assert "other users could change it" in caplog.text and "link.tar" in caplog.text


def test_the_folder_that_the_user_chose(
    shared: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = tmp_path / "own"
    assert chosen(own, "D2V_CACHE") == own and mode(own) == 0o700
    own.chmod(0o770)
    assert chosen(own, "D2V_CACHE") == own, "the user's own choice of a group"
    (tmp_path / "link").symlink_to(own)
    assert chosen(tmp_path / "link", "D2V_CACHE") == tmp_path / "link"
    assert caplog.text == ""
    own.chmod(0o777)
    assert chosen(own, "D2V_CACHE") == own / f"d2v_ds-{os.geteuid()}"
    assert "can be changed by every user (mode 0777)" in caplog.text
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"D2V_CACHE: cannot write .*file"):
        chosen(tmp_path / "file", "D2V_CACHE")


@needs_root
def test_a_chosen_folder_of_another_user(shared: Path, caplog: pytest.LogCaptureFixture) -> None:
    os.chown(shared, NOBODY, NOBODY)
    for _ in range(2):
        assert chosen(shared, "D2V_CACHE") == shared / "d2v_ds-0"
    assert caplog.text.count(f"belongs to another user (uid {NOBODY}), so") == 1


def test_a_disk_that_does_not_keep_owners(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.os, "geteuid", lambda: NOBODY + 1)
    with pytest.raises(UserError, match="the disk gives new folders to another user"):
        own_folder(shared, "new", "D2V_STAGE")


def test_locks_follow_no_links_and_empty_no_files(shared: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("content")
    with locked(precious):
        pass
    (shared / "lock").symlink_to(precious)
    with pytest.raises(OSError, match="symbolic links"), locked(shared / "lock"):
        pass
    assert precious.read_text() == "content"


def test_folders_of_processes_follow_no_links(shared: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "file").touch()
    first = OwnFolder()
    (first.path.parent / "link").symlink_to(kept, target_is_directory=True)
    OwnFolder().close()
    first.close()
    assert (kept / "file").exists()
    assert not remove_unused(first.path.parent / "link")
