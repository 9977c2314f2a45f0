"""Probes of frozen encoders on labelled shards: how well their features predict the labels.

    shard set --whole samples--> encoder block, mean over tokens --> features [n, D] --> kNN

B samples, T tokens, D width, n samples of a set.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from d2v_ds.data.shard_format import ShardSet
from d2v_ds.encoder import PretrainedEncoder, encoder_of, pretrained
from d2v_ds.errors import UserError
from d2v_ds.loader.find_set import find_set
from d2v_ds.loader.reading import read_samples
from d2v_ds.modalities.base import Modality
from d2v_ds.pretrain import Pretrain
from d2v_ds.weights import Weights, Which, open_weights

Features = npt.NDArray[np.float32]

BATCH = 16  # examples in one forward pass
NEIGHBOURS = 10
# Votes are weighted by exp(similarity / temperature), as in DINO's kNN (Caron et al. 2021).
TEMPERATURE = 0.07


@dataclass(frozen=True)
class Labelled:
    """Decoded samples of one shard set with their labels."""

    name: str
    examples: list[Any]
    labels: list[str]


def read_labelled(shards: ShardSet, modality: Modality, column: str) -> Labelled:
    """A whole shard set, decoded without crop or augmentation. Raises UserError if the .json of a
    sample has no `column`."""
    modality.check_set(shards.about)
    examples, labels = [], []
    for key, sample in read_samples(shards, (*modality.extensions, "json")):
        meta = json.loads(sample.get("json", b"{}"))
        if column not in meta:
            raise UserError(
                f"{shards.root}, sample {key!r}: its .json has no {column!r} "
                f"(it has: {', '.join(sorted(meta)) or 'nothing'}); convert with that column in "
                "the manifest, or name another column with --label"
            )
        examples.append(modality.decode(sample, None))
        labels.append(str(meta[column]))
    return Labelled(shards.root.name, examples, labels)


@torch.no_grad()
def embed(encoder: PretrainedEncoder, examples: list[Any], layer: int) -> Features:
    """The mean over tokens of the output of block `layer` (from 1) -> [n, D].

    Examples of similar size are encoded together; padding does not influence the result.
    """
    encoder.eval()
    rows: dict[int, Tensor] = {}
    by_size = sorted(range(len(examples)), key=lambda i: int(np.size(examples[i])))
    for start in range(0, len(by_size), BATCH):
        group = by_size[start : start + BATCH]
        blocks, valid = encoder([examples[i] for i in group])
        block = blocks[layer - 1].float()  # [B, T, D]
        exists = valid if valid is not None else block.new_ones(block.shape[:2])
        weight = exists[:, :, None].float()
        mean = (block * weight).sum(1) / weight.sum(1)
        rows.update(zip(group, mean.cpu(), strict=True))
    return torch.stack([rows[i] for i in range(len(examples))]).numpy()


def knn_accuracy(
    gallery: Features, gallery_labels: list[str], queries: Features, query_labels: list[str]
) -> float:
    """The fraction of queries whose label gets the most votes from the nearest gallery rows, by
    cosine similarity of features standardised with the gallery's statistics."""
    classes = sorted(set(gallery_labels))
    mean, std = gallery.mean(0), gallery.std(0) + 1e-6
    rows, points = (
        F.normalize(torch.from_numpy((x - mean) / std), dim=1) for x in (gallery, queries)
    )
    similarity, nearest = (points @ rows.T).topk(min(NEIGHBOURS, len(rows)))
    label = torch.tensor([classes.index(name) for name in gallery_labels])
    votes = torch.zeros(len(points), len(classes))
    votes.scatter_add_(1, label[nearest], (similarity / TEMPERATURE).exp())
    predicted = [classes[i] for i in votes.argmax(1).tolist()]
    return float(np.mean([p == q for p, q in zip(predicted, query_labels, strict=True)]))


def run_knn(
    path: Path,
    *,
    gallery: str,
    tests: list[str],
    label: str = "label",
    weights: Which = "student",
    layer: int | None = None,
    modality: str | None = None,
    compare: bool = False,
) -> tuple[str, dict[str, Any]]:
    """kNN accuracy of the encoder in a run folder or checkpoint: a table, and the same as JSON.

    layer: the block, counted from 1; None: the middle block. compare: also score the encoder before
    training and the modality's plain features. Raises UserError.
    """
    found = open_weights(path)
    trained = pretrained(found, weights, modality or "")
    kind = trained.modality
    initial = untrained(found, kind.name) if compare else None
    depth = trained.depth
    block = (depth + 1) // 2 if layer is None else layer
    if block > depth:
        raise UserError(f"--layer: the encoder has {depth} blocks, got {block}")
    sets = [read_labelled(find_set(s, kind.name), kind, label) for s in (gallery, *tests)]

    def score(encode: Callable[[list[Any]], Features]) -> dict[str, float]:
        known, *queries = (encode(labelled.examples) for labelled in sets)
        return {
            labelled.name: knn_accuracy(known, sets[0].labels, features, labelled.labels)
            for features, labelled in zip(queries, sets[1:], strict=True)
        }

    table = {f"trained {weights}": score(lambda examples: embed(trained, examples, block))}
    if initial:
        table["untrained encoder"] = score(lambda examples: embed(initial, examples, block))
        table[kind.baseline_name] = score(
            lambda examples: np.stack([kind.baseline(example) for example in examples])
        )
    table["chance"] = {s.name: chance(s.labels) for s in sets[1:]}
    title = (
        f"kNN accuracy at step {found.step}, block {block} of {depth}, "
        f"gallery of {len(sets[0].labels)} labelled samples"
    )
    summary = {
        "probe": "knn",
        "run": str(path),
        "step": found.step,
        "weights": weights,
        "layer": block,
        "gallery": len(sets[0].labels),
        "test": {s.name: len(s.labels) for s in sets[1:]},
        "accuracy": table,
    }
    return format_table(title, table, sets[1:]), summary


def untrained(found: Weights, modality: str) -> PretrainedEncoder:
    """The encoder of a run before its first step."""
    assert found.config is not None
    torch.manual_seed(found.config.run.seed)
    return encoder_of(Pretrain.create(found.config), modality, "student")


def chance(labels: list[str]) -> float:
    """Accuracy of always naming the most frequent class."""
    return max(map(labels.count, labels)) / len(labels)


def format_table(title: str, table: dict[str, dict[str, float]], tests: list[Labelled]) -> str:
    """Rows of percentages below the names and sizes of the test sets."""
    heads = [f"{test.name} ({len(test.labels)})" for test in tests]
    width = max(len(name) for name in table) + 2
    lines = [title, " " * width + "  ".join(f"{head:>14}" for head in heads)]
    for name, row in table.items():
        cells = "  ".join(f"{100 * row[test.name]:13.1f}%" for test in tests)
        lines.append(f"{name:<{width}}{cells}")
    return "\n".join(lines)
