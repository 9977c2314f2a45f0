"""The tokenizer of a text set, kept with the run: its encoder is of no use without it."""

from __future__ import annotations

import logging
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
