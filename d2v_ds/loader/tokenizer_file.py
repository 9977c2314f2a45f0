"""The tokenizer of a text set. It is kept with the run, whose encoder is of no use without it, and
compared: ids of another tokenizer have the same range, but other meanings."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path

from d2v_ds.data.download import read_all, try_again, url_of
from d2v_ds.data.shard_format import ShardSet
from d2v_ds.errors import UserError
from d2v_ds.files import write_atomically

log = logging.getLogger("d2v_ds")


def keep_tokenizer(shards: ShardSet, target: Path) -> None:
    """Copies the sentencepiece model that index.json names to `target`. Does nothing for a set
    without one; a model that cannot be read is reported in the log."""
    name = shards.about.get("tokenizer", {}).get("file")
    if not name:
        return
    try:
        if shards.remote:
            url = url_of(shards.remote, name)
            content = try_again(lambda: read_all(url), url)
        else:
            content = (shards.root / name).read_bytes()
    except (OSError, UserError) as error:
        log.warning("the run folder has no tokenizer.model, which exports need: %s", error)
        return
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
                f"both with the same one, for example with {first}/tokenizer.model"
            )


def refuse_other(source: Path, files: Mapping[str, Path], sets: Iterable[ShardSet]) -> None:
    """Raises UserError if the text of `sets` has another tokenizer than the weights of `source`,
    whose other files are `files`. A tokenizer of the weights that is not of sentencepiece cannot
    be compared; the log says so."""
    model = files.get("tokenizer.model")
    known = hashlib.sha256(model.read_bytes()).hexdigest() if model else None
    for shards in sets:
        ours = hash_of(shards)
        if known is None or ours is None:
            lacking = f"init: {source}" if known is None else str(shards.root)
            log.warning(
                "%s has no tokenizer.model, so the tokenizers of init and %s are not compared; the "
                "same id must mean the same piece",
                *(lacking, shards.root),
            )
        elif ours != known:
            raise UserError(
                f"init: {source} was trained with another tokenizer than that of {shards.root}; "
                f"convert the corpus with --tokenizer {model}, or train new embeddings with "
                "'init_skip=[encoder.front_ends.text.features.tokens.weight]'"
            )


def hash_of(shards: ShardSet) -> str | None:
    """SHA-256 of the tokenizer's file; None if index.json does not have it."""
    found = shards.about.get("tokenizer", {}).get("sha256")
    return str(found) if found else None
