"""Folders on shared disks that only this user can change.

    /tmp, D2V_CACHE, D2V_STAGE --own_folder--> a folder of this user below it

Anybody may create a folder in /tmp under a name that this user would use, or leave a link there.
What such a folder contains would be trained on, and what is written through a link could replace a
file elsewhere. A folder is therefore used only if it is no link, belongs to this user and can be
changed by nobody else.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from d2v_ds.errors import UserError

log = logging.getLogger("d2v_ds")

PRIVATE = 0o700  # mode of new folders
OF_OTHERS = stat.S_IWGRP | stat.S_IWOTH  # permission of others to change a folder
NAMES = 10  # of own folders that are tried if others have taken the first ones


class Taken(UserError):
    """The folder belongs to someone else, or is no folder."""


@contextlib.contextmanager
def writing(folder: Path, variable: str = "D2V_CACHE") -> Iterator[None]:
    """Turns errors of the local disk into UserError. variable: what the folder is set by."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{variable}: cannot write {folder} ({error})") from None


def cache_name() -> str:
    """The name of this user's own folder in a shared one."""
    return f"d2v_ds-{os.geteuid()}"


def chosen(folder: Path, variable: str) -> Path:
    """The folder that the user has chosen by `variable`, or, if other users can change it, an own
    one below it, which the log says. It is created if needed. Raises UserError."""
    folder = folder.absolute()
    with writing(folder, variable):
        folder.mkdir(PRIVATE, parents=True, exist_ok=True)
        found = folder.stat()  # a link is the user's own choice
    if found.st_uid != os.geteuid():
        reason = f"belongs to another user (uid {found.st_uid})"
    elif found.st_mode & stat.S_IWOTH and not found.st_mode & stat.S_ISVTX:
        reason = f"can be changed by every user (mode {stat.S_IMODE(found.st_mode):04o})"
    else:
        return folder
    own = own_folder(folder, cache_name(), variable)
    _tell(f"{variable}: {folder} {reason}, so {own} is used, which only you can change")
    return own


def own_folder(parent: Path, name: str, variable: str) -> Path:
    """The folder `name` of this user in a folder that others may write to; NAME-1 ... if others
    have taken the name, which the log says. Raises UserError."""
    taken: list[Taken] = []
    for number in range(NAMES):
        folder = parent / (f"{name}-{number}" if number else name)
        try:
            private(folder, variable)
        except Taken as error:
            taken.append(error)
            continue
        if taken:
            _tell(f"{taken[0]}; {folder} is used instead")
        return folder
    raise UserError(
        f"{taken[0]}, and so do {NAMES - 1} others; set {variable} to a folder of your own"
    )


def private(folder: Path, variable: str) -> None:
    """Creates a folder that only this user can change, or checks an existing one. One of this user
    that others could change, as earlier versions created them, is closed to them, and what others
    put into it is removed. Raises Taken, UserError."""
    with writing(folder, variable):
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = False
        with contextlib.suppress(FileExistsError):
            folder.mkdir(PRIVATE)
            made = True
        found = folder.lstat()
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid():
            if found.st_mode & OF_OTHERS:
                _close_to_others(folder, found.st_mode)
            return
    if made:
        raise UserError(
            f"{folder}: the disk gives new folders to another user (uid {found.st_uid}), so it is "
            f"not known who can change them; set {variable} to a folder on a local disk"
        )
    if stat.S_ISDIR(found.st_mode):
        raise Taken(f"{folder}: belongs to another user (uid {found.st_uid})")
    raise Taken(f"{folder}: is a {'link' if stat.S_ISLNK(found.st_mode) else 'file'}, not a folder")


def _close_to_others(folder: Path, mode: int) -> None:
    folder.chmod(stat.S_IMODE(mode) & ~OF_OTHERS)
    removed = []
    with os.scandir(folder) as entries:
        for entry in entries:
            found = entry.stat(follow_symlinks=False)
            if found.st_uid == os.geteuid() and not stat.S_ISLNK(found.st_mode):
                continue
            removed.append(entry.name)
            if stat.S_ISDIR(found.st_mode):
                shutil.rmtree(entry.path, ignore_errors=True)
            else:
                os.unlink(entry.path)
    what = f"; removed what others put there: {', '.join(removed)}" if removed else ""
    log.warning("%s: other users could change it; now only you can%s", folder, what)


@functools.cache
def _tell(message: str) -> None:
    """Logs it once in a process."""
    log.warning("%s", message)
