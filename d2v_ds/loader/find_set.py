"""What data.shards names: a shard set, a folder of third-party tars, or a URL prefix.

    data.shards --find_set--> ShardSet

Tars without an index are indexed when they are first used. The index is written next to them or, if
their folder is read-only, into the cache's folder (data/cache/). Tars at URLs are not a set; they
are streamed (stream.py).
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path

from braceexpand import braceexpand

from d2v_ds.data.cache.folder import Cache
from d2v_ds.data.cache.private import private
from d2v_ds.data.cache.remote import open_remote
from d2v_ds.data.download import is_remote
from d2v_ds.data.shard_format import INDEX_FILE, PLAN_FILE, ShardSet, open_set
from d2v_ds.data.shard_index import index_of
from d2v_ds.data.tar_index import index_set
from d2v_ds.errors import UserError
from d2v_ds.files import locked
from d2v_ds.modalities import sample_formats
from d2v_ds.secrets import mask

log = logging.getLogger("d2v_ds")


def find_set(where: str | Path, modality: str = "", check_tars: bool = True) -> ShardSet:
    """The set; for a folder with a set the same as open_set. Raises UserError."""
    if stream_tars(str(where)):
        raise UserError(
            f"{mask(str(where))}: names tars without an index, which only training and "
            "d2v_ds.webdataset can stream; give a folder or a URL prefix with a shard set "
            "(`d2v-shards index` makes one from tars)"
        )
    if is_remote(str(where)):
        return open_remote(str(where), modality)
    root = Path(where)
    try:
        return _find_local(root, modality, check_tars)
    except OSError as error:  # a folder that may not be searched or listed
        raise UserError(f"{root}: cannot be read ({error.strerror})") from None


def _find_local(root: Path, modality: str, check_tars: bool) -> ShardSet:
    if (root / INDEX_FILE).exists() or (root / PLAN_FILE).exists() or not root.is_dir():
        return open_set(root, modality, check_tars)
    tars = sorted(root.glob("*.tar"))
    if not tars:
        return open_set(root, modality, check_tars)  # raises the error
    return open_set(_indexed(root, tars, modality), modality, check_tars)


def stream_tars(where: str) -> list[str]:
    """The tars that a URL or command names, with `{000..127}` and `{a,b}` expanded as in a shell;
    empty if it names a set or a folder. Raises UserError."""
    command = where.startswith("pipe:")
    if "{}" in where or not re.search(r"\.tar\b" if command else r"\.tar($|[?#])", where):
        return []
    if is_remote(where):
        # Other braces are part of the command.
        parts = re.split(r"(\{(?:\d+\.\.\d+|[\w-]+(?:,[\w-]+)+)\})", where)
        choices = [list(braceexpand(p)) if i % 2 else [p] for i, p in enumerate(parts)]
        return ["".join(choice) for choice in itertools.product(*choices)]
    if not Path(where).is_dir():
        raise UserError(
            f"{where}: is a local tar; give its folder instead, which is indexed on first use"
        )
    return []


def _indexed(root: Path, tars: list[Path], modality: str) -> Path:
    """The folder with the index, which is written by the first process that needs it."""
    out = root
    if not os.access(root, os.W_OK):
        facts = [str(root.resolve())]
        facts += [f"{tar.name} {(stat := tar.stat()).st_size} {stat.st_mtime_ns}" for tar in tars]
        digest = hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]
        out = Cache.from_environment().folder / f"{root.name}-{digest}"
        private(out, "D2V_CACHE")
    try:
        with locked(out / ".index.lock"):
            if out != root:
                _drop_damaged(out)
            if not (out / INDEX_FILE).exists():
                log.info("%s: has no index; reading the headers of %d tars", root, len(tars))
                index_set(tars, out, sample_formats(modality))
    except OSError as error:
        raise UserError(f"{out}: cannot write the index of {root} ({error.strerror})") from None
    return out


def _drop_damaged(out: Path) -> None:
    """Removes the index.json of an index in the cache that is damaged, so that it is made again.
    Each process looks once."""
    if out in _checked or not (out / INDEX_FILE).exists():
        return
    try:
        shards = open_set(out, check_tars=False)
        for entry in shards.shards:
            index_of(shards, entry, "the tars are indexed again")
    except UserError as error:
        log.warning("%s", error)
        (out / INDEX_FILE).unlink()
    _checked.add(out)


_checked = set[Path]()  # indexes in the cache


def require_tars(tars: Sequence[str], ranks: int) -> None:
    """Raises UserError unless there are enough tars for every rank to stream its own."""
    if len(tars) < ranks:
        raise UserError(
            f"data.shards: {len(tars)} tars without an index for {ranks} ranks, each of which "
            f"streams its own. Use at most {len(tars)} ranks, more and smaller tars, or make a "
            "shard set of them: `d2v-shards index`"
        )
