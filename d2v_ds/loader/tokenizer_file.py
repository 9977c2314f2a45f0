"""The tokenizer of a text set. It is kept with the run, whose encoder is of no use without it, and
compared: ids of another tokenizer have the same range, but other meanings."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path

from d2v_ds.data.download import read_all, try_again, url_of
from d2v_ds.data.shard_format import ShardSet
from d2v_ds.data.tokenizer_json import JSON_FILE, SENTENCEPIECE_FILE, TOKENIZER_FILES, digest
from d2v_ds.errors import UserError
from d2v_ds.files import write_atomically

log = logging.getLogger("d2v_ds")

TOKENIZER_BYTES = 1 << 28  # maximum size of a tokenizer that is downloaded


def keep_tokenizer(shards: ShardSet, target: Path) -> None:
    """Copies the tokenizer that index.json names to `target`, or beside it if the tokenizer is of
    the other kind. Does nothing for a set without one; one that cannot be read is reported in the
    log."""
    name = file_of(shards)
    if not name:
        return
    try:
        if shards.remote:
            url = url_of(shards.remote, name)
            content = try_again(lambda: read_all(url, TOKENIZER_BYTES), url)
        else:
            content = (shards.root / name).read_bytes()
    except (OSError, UserError) as error:
        log.warning("the run folder has no %s, which exports need: %s", name, error)
        return
    if name != target.name and {name, target.name} <= set(TOKENIZER_FILES):
        target.unlink(missing_ok=True)  # of other sets
        target = target.with_name(name)
    if target.exists() and target.read_bytes() != content:
        log.warning("%s differs from the tokenizer of %s, and is replaced", target, shards.root)
    write_atomically(target, content)


def refuse_mixed(sets: Iterable[ShardSet]) -> None:
    """Raises UserError if the sets of a run were made with different tokenizers."""
    known = [shards for shards in sets if hash_of(shards)]
    for shards in known[1:]:
        if hash_of(shards) != hash_of(known[0]):
            first = known[0].root
            raise UserError(
                f"data: {shards.root} was converted with another tokenizer than {first}; convert "
                f"both with the same one, for example with {first}/{file_of(known[0])}"
            )


def refuse_other(source: Path, files: Mapping[str, Path], sets: Iterable[ShardSet]) -> None:
    """Raises UserError if the text of `sets` has another tokenizer than the weights of `source`,
    whose other files are `files`. A tokenizer of the weights that is of another kind cannot be
    compared; the log says so."""
    for shards in sets:
        ours, name = hash_of(shards), file_of(shards) or SENTENCEPIECE_FILE
        model = files.get(name)
        known = hash_of_file(model) if model else None
        if known is None or ours is None:
            lacking = f"init: {source}" if known is None else str(shards.root)
            log.warning(
                "%s has no %s, so the tokenizers of init and %s are not compared; the same id must "
                "mean the same piece",
                *(lacking, name, shards.root),
            )
        elif ours != known:
            raise UserError(
                f"init: {source} was trained with another tokenizer than that of {shards.root}; "
                f"convert the corpus with --tokenizer {model}, or train new embeddings with "
                "'init_skip=[encoder.front_ends.text.features.tokens.weight]'"
            )


def file_of(shards: ShardSet) -> str:
    """The name of the tokenizer's file in a set; "" if index.json does not have it."""
    return str(shards.about.get("tokenizer", {}).get("file") or "")


def hash_of_file(path: Path) -> str | None:
    """As `hash_of`; None for a file that cannot be read as a tokenizer."""
    content = path.read_bytes()
    if path.name != JSON_FILE:
        return hashlib.sha256(content).hexdigest()
    try:
        return digest(content)
    except ValueError:
        return None


def hash_of(shards: ShardSet) -> str | None:
    """SHA-256 of the tokenizer's file, of a tokenizer.json only of what determines the ids; None if
    index.json does not have it."""
    found = shards.about.get("tokenizer", {}).get("sha256")
    return str(found) if found else None
