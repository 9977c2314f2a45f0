"""Synthetic corpora for benchmarks that resemble speech, images and text.

make_corpora(folder) -> shard sets of WAV, FLAC, JPEG and token blocks; documents, a tokenizer
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import soundfile
import webdataset
from PIL import Image

from d2v_ds.data.shard_format import ShardSet, set_json
from shards.writer import ShardWriter

RATE = 16_000
BLOCK = 512  # tokens
ROWS = 1024  # blocks per member


def speech_like(seconds: float, rng: np.random.Generator) -> np.ndarray[Any, Any]:
    """int16 [S]: low-passed noise under a slowly changing loudness with pauses."""
    S = round(seconds * RATE)
    noise = np.fft.irfft(
        np.fft.rfft(rng.normal(size=S)) / (1 + (np.arange(S // 2 + 1) * RATE / S / 800) ** 1.5), S
    )
    syllables = rng.gamma(0.7, 1.0, S // 2400 + 2)
    loudness = np.interp(np.arange(S) / 2400, np.arange(len(syllables)), syllables)
    return np.asarray(np.clip(noise / noise.std() * loudness * 1500, -32768, 32767), np.int16)


def utterance_seconds(number: int, rng: np.random.Generator) -> np.ndarray[Any, Any]:
    """Lengths distributed as in LibriSpeech: most are 12 to 17 s, many are shorter, few longer."""
    kind = rng.random(number)
    seconds = np.where(kind < 0.3, rng.uniform(1.3, 12, number), rng.normal(14.2, 1.3, number))
    return np.where(kind > 0.97, rng.uniform(15, 35, number), seconds).clip(1.2, 35)


def audio_bytes(samples: np.ndarray[Any, Any], kind: str) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, RATE, format=kind, subtype="PCM_16")
    return buffer.getvalue()


def picture_bytes(rng: np.random.Generator) -> bytes:
    """JPEG, 500 x 375: blobs, some sharp edges, grain."""
    soft = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((500, 375), 3)
    pixels = np.asarray(soft, np.float32) + rng.normal(0, 11, (375, 500, 1))
    for _ in range(20):
        y, x = rng.integers(0, 330), rng.integers(0, 450)
        pixels[y : y + 45, x : x + 50] += rng.normal(0, 40, 3)
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def sentences(number: int, rng: np.random.Generator) -> list[str]:
    letters = list("etaoinshrdlucmfw")
    words = ["".join(rng.choice(letters, rng.integers(2, 9))) for _ in range(50_000)]
    share = 1 / np.arange(1, 50_001)
    drawn = rng.choice(50_000, (number, 16), p=share / share.sum())
    return [" ".join(words[i] for i in row) + "." for row in drawn]


Samples = Iterable[tuple[bytes, int]]


def write_set(root: Path, modality: str, unit: str, field: str, samples: Samples) -> ShardSet:
    """Writes four shards with one member per sample. samples: (payload, length)."""
    root.mkdir()
    everything = list(samples)
    entries = []
    for i in range(4):
        with ShardWriter(root, f"{modality}-{i:06d}", (field,)) as writer:
            for j, (payload, length) in enumerate(everything[i::4]):
                writer.add(f"{i}/{j:06d}", [payload], length)
            entries.append(writer.finish())
    return finish_set(root, modality, unit, field, entries)


def finish_set(root: Path, modality: str, unit: str, field: str, entries: list[Any]) -> ShardSet:
    found = ShardSet(root, modality, unit, RATE, (field,), tuple(entries))
    (root / "index.json").write_text(set_json(found))
    return found


@dataclass
class Corpora:
    wav: ShardSet
    flac: ShardSet
    long: ShardSet  # FLAC recordings of 2 minutes
    jpg: ShardSet
    blocks: ShardSet  # of tokens
    text: Path  # the same text as a tar of documents
    tokenizer: Path


def make_corpora(root: Path, scale: float) -> Corpora:
    rng = np.random.default_rng(0)
    spoken = [speech_like(s, rng) for s in utterance_seconds(round(240 * scale), rng)]
    long = [speech_like(120, rng) for _ in range(round(24 * scale))]

    def audio(name: str, kind: str, samples: list[Any]) -> ShardSet:
        encoded = ((audio_bytes(x, kind), len(x)) for x in samples)
        return write_set(root / name, "speech", "frames", kind, encoded)

    pictures = ((picture_bytes(rng), 500 * 375) for _ in range(round(400 * scale)))
    tokenizer, text, blocks = make_text(root, sentences(round(60_000 * scale), rng))
    return Corpora(
        audio("wav", "wav", spoken),
        audio("flac", "flac", spoken),
        audio("long", "flac", long),
        write_set(root / "jpg", "vision", "pixels", "jpg", pictures),
        blocks,
        text,
        tokenizer,
    )


def make_text(root: Path, lines: list[str]) -> tuple[Path, Path, ShardSet]:
    (root / "text.txt").write_text("\n".join(lines[:20_000]))
    sentencepiece.SentencePieceTrainer.train(
        input=str(root / "text.txt"),
        model_prefix=str(root / "model"),
        vocab_size=16_000,
        model_type="bpe",
        minloglevel=2,
        hard_vocab_limit=False,
    )
    documents = [" ".join(lines[i : i + 40]) for i in range(0, len(lines), 40)]
    with webdataset.TarWriter(str(root / "text.tar"), mtime=0) as writer:
        for i, document in enumerate(documents):
            writer.write({"__key__": f"{i:06d}", "txt": document.encode()})
    encode = sentencepiece.SentencePieceProcessor(model_file=str(root / "model.model")).encode
    ids = np.array([i for document in documents for i in (*encode(document), 2)], "<u2")
    packed = ids[: len(ids) // BLOCK * BLOCK].reshape(-1, BLOCK)
    (root / "blocks").mkdir()
    with ShardWriter(root / "blocks", "text-000000", ("u16",)) as shard:
        for member, start in enumerate(range(0, len(packed), ROWS)):
            buffer = io.BytesIO()
            np.save(buffer, packed[start : start + ROWS])
            head, size = len(buffer.getvalue()) - packed[start : start + ROWS].nbytes, 2 * BLOCK
            rows = len(packed[start : start + ROWS])
            places = [(f"{member}/{r}", head + r * size, size, BLOCK) for r in range(rows)]
            shard.add_packed(f"{member:06d}.npy", buffer.getvalue(), places)
        entry = shard.finish()
    blocks = finish_set(root / "blocks", "text", "tokens", "u16", [entry])
    return root / "model.model", root / "text.tar", blocks
