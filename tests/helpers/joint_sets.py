"""Small real shard sets of images and text, and settings that make joint_tiny smaller.

An image is a square in one corner of a background of another colour; the label is the corner. In a
text, each id is followed by one of two other ids; the label is the range that the ids come from.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from d2v_ds.data.shard_format import INDEX_FILE, ShardSet, set_json
from shards import samples
from shards.cli import main as shards_main
from shards.writer import ShardWriter

Row = tuple[str, Sequence[bytes], int]  # key, members, length

SMALL = [
    "model.dim=32",
    "model.depth=2",
    "model.dropout=0.1",
    "model.layer_drop=0.2",
    "target.top_k=2",
    "batch.size={speech: 3.2, vision: 8, text: 160}",
    "modality.speech.views=2",
    "modality.speech.convs="
    "[[8, 10, 5], [8, 3, 2], [8, 3, 2], [16, 3, 2], [16, 3, 2], [16, 2, 2], [16, 2, 2]]",
    "modality.speech.positions.groups=4",
    "modality.speech.crop_seconds=0.8",
    "modality.speech.min_seconds=0.2",
    "modality.vision.views=2",
    "modality.vision.image_size=16",
    "modality.text.views=2",
    "modality.text.vocab_size=64",
    "modality.text.mask_id=63",
    "modality.text.max_tokens=40",
    *(
        f"modality.{name}.decoder.{setting}"
        for name in ("speech", "vision", "text")
        for setting in ("dim=16", "depth=2", "groups=4")
    ),
]


def write(root: Path, modality: str, unit: str, fields: Sequence[str], rows: Iterator[Row]) -> Path:
    """A shard set with a single shard."""
    root.mkdir(parents=True)
    with ShardWriter(root, f"{modality}-000000", fields) as writer:
        for key, members, length in rows:
            writer.add(key, members, length)
        entry = writer.finish()
    shards = ShardSet(root, modality, unit, 0, tuple(fields), (entry,))
    (root / INDEX_FILE).write_text(set_json(shards))
    return root


def write_images(
    root: Path,
    number: int,
    seed: int = 0,
    label: Callable[[int], str] = lambda corner: f"corner {corner}",
) -> Path:
    def rows() -> Iterator[Row]:
        rng = np.random.default_rng(seed)
        for i in range(number):
            corner = i % 4
            pixels = np.tile(rng.integers(0, 128, 3, dtype=np.uint8), (20, 20, 1))
            y, x = 10 * (corner // 2), 10 * (corner % 2)
            pixels[y : y + 10, x : x + 10] = rng.integers(128, 256, 3)
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "PNG")
            about = json.dumps({"label": label(corner)}).encode()
            yield f"image{i:04d}", (about, buffer.getvalue()), 400

    return write(root, "vision", "pixels", ("json", "png"), rows())


def write_texts(root: Path, number: int, seed: int = 0) -> Path:
    def rows() -> Iterator[Row]:
        rng = np.random.default_rng(seed)
        for i in range(number):
            length, first = int(rng.integers(20, 60)), 4 + 28 * (i % 2)
            ids = first + (np.cumsum(rng.integers(1, 3, length)) % 28)
            buffer = io.BytesIO()
            np.save(buffer, ids.astype(np.uint16))
            label = json.dumps({"label": "low" if first == 4 else "high"}).encode()
            yield f"text{i:04d}", (label, buffer.getvalue()), length

    return write(root, "text", "tokens", ("json", "npy"), rows())


def write_speech(root: Path) -> Path:
    """Fifty real recordings of spoken digits."""
    source = samples.path("speech") / "seen.tsv"
    assert shards_main(["speech", str(source), str(root), "-j", "1"]) == 0
    return root


def write_all(root: Path) -> dict[str, Path]:
    return {
        "speech": write_speech(root / "speech"),
        "vision": write_images(root / "vision", 40),
        "text": write_texts(root / "text", 40),
    }


def shards_setting(sets: dict[str, Path]) -> str:
    return f"data.shards={{{', '.join(f'{name}: {path}' for name, path in sets.items())}}}"
