"""Small speech sets for tests of the commands that read sets."""

from __future__ import annotations

from pathlib import Path

from d2v_ds.data.shard_format import INDEX_FILE, ShardSet, set_json
from shards.writer import ShardWriter


def build(folder: Path, samples_of: list[list[tuple[str, bytes, bytes, int]]]) -> Path:
    """A set with correct checksums, made of rows (key, flac, json, length)."""
    folder.mkdir()
    entries = []
    for i, rows in enumerate(samples_of):
        with ShardWriter(folder, f"speech-{i:06d}", ("flac", "json")) as writer:
            for key, flac, json, length in rows:
                writer.add(key, (flac, json), length)
            entries.append(writer.finish())
    result = ShardSet(folder, "speech", "frames", 8000, ("flac", "json"), tuple(entries))
    (folder / INDEX_FILE).write_text(
        set_json(result, options={"rate": 8000}, inputs=len(samples_of), quarantined=0)
    )
    return folder
