"""Files of the cache and of D2V_STAGE that have been damaged since they were written: bits that
changed on the disk, or contents that a power failure left incomplete.

    damaged tar --renew_tar--> fetched again;  damaged index --index_for, lengths_for--> the same

Reading finds the damage, by checksums. The copy is replaced while other processes may be reading
it; they keep the old file until they find damage themselves.
"""

from __future__ import annotations

import contextlib
import logging
from array import array
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from d2v_ds.data.cache.folder import LOCK_FILE
from d2v_ds.data.cache.private import writing
from d2v_ds.data.cache.remote import fetch_index, fetch_shard, is_at, lock_of
from d2v_ds.data.cache.stage import copy_index, copy_tar
from d2v_ds.data.download import url_of
from d2v_ds.data.shard_format import ADVICE, ShardEntry, ShardSet
from d2v_ds.data.shard_index import ShardIndex, index_of, read_lengths
from d2v_ds.errors import UserError
from d2v_ds.files import locked, sha256
from d2v_ds.secrets import mask

log = logging.getLogger("d2v_ds")

FETCH = "it is fetched again"

Result = TypeVar("Result")


def origin(shards: ShardSet, entry: ShardEntry) -> str:
    """Where the tar of a copy came from, for messages; "" for the files of the set itself."""
    if shards.remote:
        return mask(url_of(shards.remote, f"{entry.name}.tar"))
    return str(shards.source.tar(entry)) if shards.source else ""


def renew_tar(shards: ShardSet, entry: ShardEntry, file: int) -> bool:
    """Replaces the tar of a copy, in which a sample is damaged. Returns False if that does not help
    because the source has the same bytes, and for a set that is no copy. file: the open tar.

    Raises UserError if the tar cannot be fetched; the copy then stays as it is.
    """
    if not shards.is_copy:
        return False
    path = shards.tar(entry)
    lock = lock_of(path) if shards.remote else path.with_name(LOCK_FILE)
    with writing(path.parent, _variable(shards)), locked(lock):
        if not is_at(path, file):  # another process has replaced it
            return True
        if not shards.indexed and _same(file, entry):
            return False
        log.warning("%s: its content has changed since it was written; %s", path, FETCH)
        if shards.source:
            copy_tar(shards.source, path.parent, entry, lambda: None)
        else:
            fetch_shard(shards, entry)
    return True


def _same(file: int, entry: ShardEntry) -> bool:
    try:
        return sha256(file) == entry.sha256
    except OSError:  # a part of the disk cannot be read
        return False


def index_for(shards: ShardSet, entry: ShardEntry) -> ShardIndex:
    """The index of a shard; that of a copy is fetched again if it is damaged. Raises UserError."""
    return _of_index(shards, entry, partial(index_of, shards, entry))


def lengths_for(shards: ShardSet, entry: ShardEntry) -> array[int]:
    """As index_for, only the lengths."""
    return _of_index(shards, entry, partial(_lengths, shards, entry))


def _lengths(shards: ShardSet, entry: ShardEntry, advice: str = ADVICE) -> array[int]:
    return read_lengths(shards.index(entry), entry, shards.fields, advice)


def _of_index(shards: ShardSet, entry: ShardEntry, read: Callable[..., Result]) -> Result:
    """What `read` reads from the index of a shard."""
    if not shards.is_copy:
        return read()
    with contextlib.suppress(UserError):
        return read(advice=FETCH)
    path = shards.index(entry)
    with writing(path.parent, _variable(shards)), locked(path.with_name(LOCK_FILE)):
        try:
            return read(advice=FETCH)  # another process may have fetched it
        except UserError as error:
            log.warning("%s", error)
        if shards.source:
            copy_index(shards.source, path.parent, entry, lambda: None)
        else:
            fetch_index(shards, entry)
    return read()


def _variable(shards: ShardSet) -> str:
    """What the folder of a copy is set by."""
    return "D2V_CACHE" if shards.remote else "D2V_STAGE"
