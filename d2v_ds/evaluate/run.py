"""One evaluation: opens the weights and the sets, fits the probe, and scores the test sets."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from d2v_ds.encoder import PretrainedEncoder, best_device, encoder_of, pretrained
from d2v_ds.errors import UserError
from d2v_ds.evaluate.embedding import embed_blocks, embed_tokens, of_set
from d2v_ds.evaluate.labelled import Labelled, chance, open_labelled
from d2v_ds.evaluate.probes import PROBES, Probe
from d2v_ds.evaluate.scoring import OfBlock, Result, Scorer
from d2v_ds.evaluate.table import format_results
from d2v_ds.modalities.base import Modality
from d2v_ds.pretrain import Pretrain
from d2v_ds.weights import Weights, Which, open_weights

log = logging.getLogger("d2v_ds")


def run_probe(
    path: Path,
    *,
    probe: str = "knn",
    train: str,
    tests: Sequence[str],
    label: str = "label",
    weights: Literal["student", "teacher", "both"] = "student",
    layer: int | Literal["all"] | None = None,
    modality: str | None = None,
    compare: bool = False,
) -> tuple[str, dict[str, Any]]:
    """The accuracy of a probe on frozen features: a table, and the same as JSON.

    train, tests: labelled shard sets. layer: the block, counted from 1; None: the middle block;
    "all": the best one. compare: also score the encoder before training and the modality's plain
    features. Raises UserError.
    """
    chosen = PROBES[probe]
    found = open_weights(path)
    which: list[Which] = ["student", "teacher"] if weights == "both" else [weights]
    encoders = {f"trained {name}": pretrained(found, name, modality or "") for name in which}
    first = next(iter(encoders.values()))
    kind, depth = first.modality, first.depth
    blocks = blocks_of(layer, depth)
    if compare:
        encoders["untrained encoder"] = untrained(found, kind.name)
    known, *queries = open_labelled([train, *tests], kind, label)
    scorer = Scorer(chosen, known, queries)
    results = {
        name: scorer.score(of_encoder(encoder.to(best_device()), blocks, chosen), blocks)
        for name, encoder in encoders.items()
    }
    if compare and not chosen.tokens:
        results[kind.baseline_name] = scorer.score(of_baseline(kind), [0])
    by_chance = {each.name: chance(each.labels) for each in queries}
    at = f"step {found.step}" if found.config else path.name
    return (
        format_results(title(chosen, at, blocks, depth, len(known.labels)), scorer, results),
        {
            "probe": probe,
            "run": str(path),
            "step": found.step,
            "modality": kind.name,
            "weights": weights,
            "layer": blocks[0] if len(blocks) == 1 else "all",
            "gallery": len(known.labels),
            "test": {each.name: len(each.labels) for each in queries},
            "accuracy": {**each(results, "accuracy"), "chance": by_chance},
            "top5": each(results, "top"),
            "interval": each(results, "interval"),
            "chosen": {
                name: {
                    "block": result.block,
                    **({chosen.strength: result.strength} if chosen.strength else {}),
                    "held_out": result.held_out,
                }
                for name, result in results.items()
                if result.held_out
            },
        },
    )


def each(results: Mapping[str, Result], name: str) -> dict[str, Any]:
    return {row: getattr(result, name) for row, result in results.items()}


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
    """`run_probe` with the kNN probe. gallery: the labelled shard set of the neighbours."""
    return run_probe(
        path,
        train=gallery,
        tests=tests,
        label=label,
        weights=weights,
        layer=layer,
        modality=modality,
        compare=compare,
    )


def blocks_of(layer: int | Literal["all"] | None, depth: int) -> list[int]:
    """The blocks to probe. Raises UserError if the encoder has no such block."""
    if layer == "all":
        return list(range(1, depth + 1))
    block = (depth + 1) // 2 if layer is None else layer
    if block > depth:
        raise UserError(f"--layer: the encoder has {depth} blocks, got {block}")
    return [block]


def title(probe: Probe, at: str, blocks: list[int], depth: int, samples: int) -> str:
    block = f"block {blocks[0]} of {depth}" if len(blocks) == 1 else f"the best of {depth} blocks"
    known = "gallery of" if probe is PROBES["knn"] else "trained on"
    return f"{probe.title} accuracy at {at}, {block}, {known} {samples} labelled samples"


def untrained(found: Weights, modality: str) -> PretrainedEncoder:
    """The encoder of a run before its first step. Raises UserError for weights without a run."""
    if found.config is None:
        raise UserError(
            f"--compare: {found.path} is not a run, so its encoder before training is unknown"
        )
    if found.finetune:
        raise UserError(
            f"--compare: {found.path} is fine-tuned, so its encoder before training is that of "
            "init; evaluate that one, or omit --compare"
        )
    torch.manual_seed(found.config.run.seed)
    return encoder_of(Pretrain.create(found.config), modality, "student")


def of_encoder(encoder: PretrainedEncoder, blocks: list[int], probe: Probe) -> OfBlock:
    """The features of an encoder. Means of all blocks are computed in one pass and kept; tokens,
    which are many times larger, are computed again for each block."""
    if probe.tokens:
        return lambda labelled, block: of_set(
            labelled, lambda examples: embed_tokens(encoder, examples, block)
        )
    kept: dict[str, Any] = {}

    def features(labelled: Labelled, block: int) -> Any:
        if labelled.name not in kept:
            kept[labelled.name] = of_set(
                labelled, lambda examples: embed_blocks(encoder, examples, blocks)
            )
        return kept[labelled.name][:, blocks.index(block)]

    return features


def of_baseline(kind: Modality) -> OfBlock:
    return lambda labelled, _: of_set(
        labelled, lambda examples: np.stack([kind.baseline(example) for example in examples])
    )
