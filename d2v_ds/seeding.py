"""Random numbers: every draw of a run is a pure function of (seed, path).

    (seed, purpose, epoch, sample ...) --generator--> numpy, for crops and masks
    (seed, step, micro-batch) --seed_torch--> torch, for dropout and noise
    (seed, purpose, epoch ...) --permutation--> the order of shards, samples and batches

No result depends on ranks, workers or machines, and no generator state is ever saved.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from numpy.random.bit_generator import ISeedSequence

# Purposes: the first element of a path, so that no two uses share a stream. Changing a number
# changes the batches of every run.
SHARD_ORDER, SAMPLE_ORDER, LOT_ORDER, CROP, MASK = range(5)
SOURCE_ORDER, TAR_GROUP = 16, 17


def generator(seed: int, *path: int) -> np.random.Generator:
    """The generator for one path in a run, for example (purpose, epoch, sample).

    Philox with a hashed key, so that the streams of similar paths are independent. Python's hash()
    would differ from process to process.
    """
    return np.random.Generator(bit_generator(seed, *path))


def bit_generator(seed: int, *path: int) -> np.random.Philox:
    """As `generator`, but the raw stream, which numpy guarantees to keep across versions."""
    text = ",".join(map(str, (seed, *path))).encode()
    key: Any = _Key(hashlib.blake2b(text, digest_size=16).digest())
    return np.random.Philox(key)


class _Key(ISeedSequence):
    """Passes its 16-byte key to Philox unchanged. Passing `key=` is slower, because numpy first
    reads entropy from the system and then discards it."""

    def __init__(self, key: bytes) -> None:
        self.key = key

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> npt.NDArray[np.uint64]:
        return np.frombuffer(self.key, "<u8")


def permutation(n: int, seed: int, *path: int) -> npt.NDArray[np.intp]:
    """A permutation of range(n) that is the same with every version of numpy.

    numpy guarantees the raw stream of a bit generator but not the output of
    Generator.permutation, so the order is that of raw 64-bit keys.
    """
    return np.argsort(bit_generator(seed, *path).random_raw(n), kind="stable")


def stable_hash(*parts: int | str) -> int:
    """A 63-bit hash that is the same in every process and on every machine."""
    text = "/".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def seed_torch(seed: int, step: int, micro_batch: int) -> None:
    """Seeds dropout and noise of one micro-batch by its index within the step."""
    torch.manual_seed(stable_hash(seed, step, micro_batch))
