"""Probes: kNN compared with a reference implementation, batch-independent features, errors."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from d2v_ds import recipes
from d2v_ds.data.shard_format import open_set
from d2v_ds.encoder import encoder_of
from d2v_ds.errors import UserError
from d2v_ds.evaluate import (
    NEIGHBOURS,
    TEMPERATURE,
    chance,
    embed,
    knn_accuracy,
    read_labelled,
    run_knn,
)
from d2v_ds.pretrain import Pretrain
from d2v_ds.weights import Which
from shards import samples
from shards.cli import main as shards_main


def slow_knn(gallery: np.ndarray, labels: list[str], query: np.ndarray) -> str:
    """The class of one query, computed in a loop over the gallery."""
    mean, std = gallery.mean(0), gallery.std(0) + 1e-6
    point = (query - mean) / std
    scored = []
    for row, label in zip((gallery - mean) / std, labels, strict=True):
        scored.append((float(row @ point / np.linalg.norm(row) / np.linalg.norm(point)), label))
    votes: Counter[str] = Counter()
    for similarity, label in sorted(scored, reverse=True)[:NEIGHBOURS]:
        votes[label] += np.exp(similarity / TEMPERATURE)
    return votes.most_common(1)[0][0]


def test_knn_matches_a_reference_implementation() -> None:
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((4, 6))
    kinds = rng.integers(4, size=60)
    gallery = (centres[kinds] + rng.standard_normal((60, 6))).astype(np.float32)
    labels = [f"class {kind}" for kind in kinds]
    wanted = rng.integers(4, size=40)
    queries = (centres[wanted] + rng.standard_normal((40, 6))).astype(np.float32)
    truth = [f"class {kind}" for kind in wanted]
    expected = np.mean(
        [slow_knn(gallery, labels, q) == t for q, t in zip(queries, truth, strict=True)]
    )
    assert 0.3 < expected < 1.0, "the test case is hopeless or trivial"
    assert knn_accuracy(gallery, labels, queries, truth) == expected


def test_a_gallery_smaller_than_the_number_of_neighbours() -> None:
    gallery = np.array([[1.0, 0.0], [0.0, 1.0]], dtype=np.float32)
    assert knn_accuracy(gallery, ["a", "b"], gallery, ["a", "b"]) == 1.0


def test_chance_is_the_most_frequent_class() -> None:
    assert chance(["a", "b", "b", "c"]) == 0.5


@pytest.fixture(scope="module")
def task() -> Pretrain:
    torch.manual_seed(0)
    return Pretrain.create(recipes.load("speech_tiny", ["model.depth=2", "target.top_k=2"]))


@pytest.mark.parametrize("weights", ["student", "teacher"])
def test_features_do_not_depend_on_the_rest_of_the_batch(task: Pretrain, weights: Which) -> None:
    rng = np.random.default_rng(0)
    encoder = encoder_of(task, "speech", weights)
    examples = [rng.standard_normal(n).astype(np.float32) for n in rng.integers(2500, 9000, 20)]
    together = embed(encoder, examples, 2)
    alone = [embed(encoder, [e], 2)[0] for e in examples]
    np.testing.assert_allclose(together, np.stack(alone), rtol=1e-4, atol=1e-5)


def test_missing_labels_are_named(tmp_path: Path, task: Pretrain) -> None:
    source = samples.path("speech") / "seen.tsv"
    assert shards_main(["speech", str(source), str(tmp_path / "set")]) == 0
    shards = open_set(tmp_path / "set", "speech")
    found = read_labelled(shards, task.modalities["speech"], "label")
    assert Counter(found.labels) == dict.fromkeys(map(str, range(10)), 5)
    with pytest.raises(UserError, match=r"its \.json has no 'word' \(it has: .*label.*\)"):
        read_labelled(shards, task.modalities["speech"], "word")


def test_a_folder_without_a_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither a checkpoint nor a run folder with a checkpoint"):
        run_knn(tmp_path, gallery="a", tests=["b"])
    (tmp_path / "config.yaml").write_text(json.dumps({}))
    with pytest.raises(UserError, match="neither a checkpoint nor a run folder with a checkpoint"):
        run_knn(tmp_path, gallery="a", tests=["b"])
