"""Labelled shard sets: the labels at once, the samples a window at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from d2v_ds.data.shard_format import ShardSet
from d2v_ds.errors import UserError
from d2v_ds.loader.find_set import find_set
from d2v_ds.loader.reading import label_of, read_samples
from d2v_ds.modalities.base import Modality, metadata

WINDOW = 256  # decoded samples in memory


@dataclass(frozen=True)
class Labelled:
    """A shard set with its labels."""

    name: str
    shards: ShardSet
    modality: Modality
    labels: list[str]

    def decoded(self) -> Iterator[Any]:
        """Every sample, without crop or augmentation. Raises UserError for a sample that cannot be
        used, because leaving it out would change the score."""
        for key, sample in read_samples(self.shards, self.modality.extensions):
            try:
                example = self.modality.decoded(sample, None)
                self.modality.check_example(example)
            except ValueError as error:
                raise UserError(f"{self.shards.root}, sample {key!r}: {error}") from None
            yield example

    def windows(self) -> Iterator[list[Any]]:
        """As `decoded`, in lists of at most WINDOW samples."""
        samples = self.decoded()
        while window := list(islice(samples, WINDOW)):
            yield window


def read_labelled(shards: ShardSet, modality: Modality, column: str, name: str = "") -> Labelled:
    """A whole shard set with the values of `column` as labels. Raises UserError for a sample
    without a label."""
    modality.check_set(shards.about)
    labels = []
    for key, sample in read_samples(shards, ("json",)):
        try:
            labels.append(str(label_of(metadata(sample), column)))
        except ValueError as error:
            raise UserError(
                f"{shards.root}, sample {key!r}: {error}; convert with that column in the "
                "manifest, or name another column with --label"
            ) from None
    return Labelled(name or shards.root.name, shards, modality, labels)


def open_labelled(paths: Sequence[str], modality: Modality, column: str) -> list[Labelled]:
    """The sets, named by their folder, or by their whole path if several folders have the same
    name. Raises UserError."""
    names = [Path(path).name for path in paths]
    return [
        read_labelled(
            find_set(path, modality.name), modality, column, path if names.count(name) > 1 else name
        )
        for path, name in zip(paths, names, strict=True)
    ]


def chance(labels: list[str]) -> float:
    """Accuracy of always naming the most frequent class."""
    return max(map(labels.count, set(labels))) / len(labels)


def held_out(labels: Sequence[int], share: float, seed: int = 0) -> np.ndarray[Any, Any]:
    """Which samples [n] are held out: of each class about this share, at least one if the class has
    several samples, drawn by the seed."""
    rng = np.random.default_rng(seed)
    held = np.zeros(len(labels), dtype=bool)
    for label in sorted(set(labels)):
        rows = rng.permutation(np.flatnonzero(np.asarray(labels) == label))
        number = max(1, round(share * len(rows))) if len(rows) > 1 else 0
        held[rows[:number]] = True
    return held
