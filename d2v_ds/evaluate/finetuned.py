"""Scores of a fine-tuned model on labelled sets: word error rate, accuracy or correlation.

    labelled shard set --FinetunedModel--> predictions --scores--> metrics with intervals

n samples of a set, T tokens, C outputs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from d2v_ds import scores
from d2v_ds.ctc import BeamSearch
from d2v_ds.data.shard_format import ShardSet
from d2v_ds.encoder import best_device
from d2v_ds.errors import UserError
from d2v_ds.evaluate.table import bounds, percent
from d2v_ds.finetune.labels import Transcripts
from d2v_ds.finetune.model import FinetunedModel, finetuned
from d2v_ds.finetune.report import best_classes, score
from d2v_ds.loader.find_set import find_set
from d2v_ds.loader.reading import read_samples
from d2v_ds.weights import open_weights

# What is evaluated -> the task of the model.
KINDS = {"wer": "ctc", "accuracy": "classification", "correlation": "regression"}
WINDOW = 256  # decoded samples in memory
BATCH = 16  # samples in one forward pass

Pairs = list[tuple[Any, Any]]  # (prediction, reference) of each sample
Beam = Callable[[Sequence[str]], BeamSearch]  # labels -> decoder


def run_finetuned(
    path: Path, *, kind: str, tests: Sequence[str], label: str = "", beam: Beam | None = None
) -> tuple[str, dict[str, Any]]:
    """The metrics of a fine-tuned model on each set: a table, and the same as JSON.

    kind: of KINDS. label: the key of the label; "": as in training. beam: makes a decoder for
    transcripts, in addition to greedy decoding. Raises UserError if the model has another task, or
    a sample cannot be used.
    """
    found = open_weights(path)
    model = finetuned(found).to(best_device())
    if label:
        model.modality.settings = dataclasses.replace(model.modality.settings, label=label)
    task = model.task.finetuning.task
    if task != KINDS[kind]:
        right = next(name for name, of in KINDS.items() if of == task)
        raise UserError(
            f"{path}: is fine-tuned for {task}; use `d2v-ds evaluate {right}`, not {kind}"
        )
    decoder = beam(model.labels.names) if beam else None
    metric = model.task.finetuning.metric
    of_sets: dict[str, dict[str, float]] = {}
    intervals: dict[str, tuple[float, float]] = {}
    sizes: dict[str, int] = {}
    for test in tests:
        name = test if [Path(t).name for t in tests].count(Path(test).name) > 1 else Path(test).name
        shards = find_set(test, model.modality.name)
        greedy, searched = outcomes(model, shards, decoder)
        of_sets[name] = score(metric, *zip(*greedy, strict=True))
        intervals[name] = interval(metric, greedy)
        sizes[name] = len(greedy)
        if searched:
            found_beam = score(metric, *zip(*searched, strict=True))
            of_sets[name] |= {f"{key}_beam": value for key, value in found_beam.items()}
    summary = {
        "probe": kind,
        "run": str(path),
        "step": found.step,
        "modality": model.modality.name,
        "weights": "student",
        "metric": metric,
        "test": sizes,
        "scores": of_sets,
        "interval": intervals,
    }
    return format_scores(metric, found.step, of_sets, intervals, sizes), summary


def outcomes(
    model: FinetunedModel, shards: ShardSet, decoder: BeamSearch | None
) -> tuple[Pairs, Pairs]:
    """(prediction, reference) of every sample, as Task.score takes them; the second list is that of
    beam search. Samples of similar size share a batch. Raises UserError for one that cannot be
    used, because leaving it out would change the score."""
    model.modality.check_set(shards.about)
    greedy: Pairs = []
    searched: Pairs = []
    samples = decoded(model, shards)
    while window := list(islice(samples, WINDOW)):
        by_size = sorted(window, key=lambda pair: int(np.size(pair[0])))
        for start in range(0, len(by_size), BATCH):
            examples, labels = zip(*by_size[start : start + BATCH], strict=True)
            with torch.no_grad():
                values, lengths = model(list(examples))
            greedy += list(predictions(model, values, lengths, labels))
            if decoder:
                searched += list(beams(model, decoder, values, lengths, labels))
    if not greedy:
        raise UserError(f"{shards.root}: has no samples")
    return greedy, searched


def decoded(model: FinetunedModel, shards: ShardSet) -> Iterator[tuple[Any, Any]]:
    """(example, label) of every sample."""
    for key, sample in read_samples(shards, model.modality.extensions):
        try:
            yield model.modality.base.decoded(sample, None), model.modality.label(sample)
        except (UserError, ValueError) as error:
            raise UserError(f"{shards.root}, sample {key!r}: {error}") from None


def predictions(
    model: FinetunedModel, values: Tensor, lengths: Tensor, labels: Sequence[Any]
) -> Iterator[tuple[Any, Any]]:
    """What Task.outcomes gives for these logits."""
    if isinstance(model.labels, Transcripts):
        best = values.argmax(-1).cpu().numpy()
        for row, T, ids in zip(best, lengths.tolist(), labels, strict=True):
            yield model.labels.greedy(row[:T]), model.labels.decode(ids.tolist())
    elif model.task.finetuning.task == "classification":
        yield from zip(best_classes(values), labels, strict=True)
    else:
        yield from zip(values[:, 0].tolist(), labels, strict=True)


def beams(
    model: FinetunedModel,
    decoder: BeamSearch,
    values: Tensor,
    lengths: Tensor,
    labels: Sequence[Any],
) -> Iterator[tuple[str, str]]:
    assert isinstance(model.labels, Transcripts), "only transcripts are searched"
    rows = values.log_softmax(-1).cpu()
    for row, T, ids in zip(rows, lengths.tolist(), labels, strict=True):
        yield decoder(row[:T]), model.labels.decode(ids.tolist())


def interval(metric: str, pairs: Pairs) -> tuple[float, float]:
    """The 95 % bootstrap interval of the metric over samples."""
    given, wanted = zip(*pairs, strict=True)
    if metric in scores.ERROR_RATES:
        counts = scores.error_counts(given, wanted, "word" if metric == "wer" else "character")
        return scores.interval(scores.error_rate, *counts)
    columns = np.array([g[0] for g in given]) if metric in CLASSES else np.array(given)
    return scores.interval(
        lambda a, b: score(metric, as_given(metric, a), b)[metric], columns, np.array(wanted)
    )


CLASSES = ("accuracy", "f1", "accuracy_f1", "matthews")


def as_given(metric: str, column: Any) -> Any:
    """A column of predictions as `score` takes them."""
    return [[int(best)] for best in column] if metric in CLASSES else column


def format_scores(
    metric: str,
    step: int,
    of_sets: dict[str, dict[str, float]],
    intervals: dict[str, tuple[float, float]],
    sizes: dict[str, int],
) -> str:
    """A row for each metric, a column for each set."""
    heads = [f"{name} ({size})" for name, size in sizes.items()]
    names = list(next(iter(of_sets.values())))
    width = max(map(len, [*names, "95 % interval"])) + 2
    lines = [f"fine-tuned model at step {step}, {metric}"]
    lines.append(" " * width + "  ".join(f"{head:>16}" for head in heads))
    for name in names:
        cells = [f"{percent(row[name]):>16}" for row in of_sets.values()]
        lines.append(f"{name:<{width}}{'  '.join(cells)}")
    cells = [f"{bounds(interval):>16}" for interval in intervals.values()]
    lines.append(f"{'95 % interval':<{width}}{'  '.join(cells)}")
    return "\n".join(lines)
