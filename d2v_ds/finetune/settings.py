"""The settings that a fine-tuning recipe leaves open: those of the encoder come from `init`, the
labels from the training set.

    recipe + model.*, modality.* of init + labels of data.shards --resolve--> complete Config

A run that resumes has them in its config.yaml and reads neither again.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

from d2v_ds.config import Config
from d2v_ds.config.decoding import decode, merge, to_dict
from d2v_ds.config.documents import load_yaml
from d2v_ds.config.finetuning import FineTuning, Metric
from d2v_ds.data.shard_format import ShardSet
from d2v_ds.distributed.collectives import on_rank_0
from d2v_ds.errors import UserError
from d2v_ds.finetune.labels import BLANK, Classes, Labels, Letters, Numbers, Pieces
from d2v_ds.loader.find_set import find_set, stream_tars
from d2v_ds.loader.reading import label_of, read_samples
from d2v_ds.modalities import create_modalities
from d2v_ds.modalities.base import metadata
from d2v_ds.run.run_folder import RunFolder
from d2v_ds.transformer import TransformerConfig
from d2v_ds.weights import open_weights

METRICS: dict[str, Metric] = {
    "ctc": "wer",
    "classification": "accuracy",
    "regression": "pearson_spearman",
}
TASKS = {"speech": ("ctc", "classification"), "vision": ("classification",)}


def resolve(config: Config) -> Config:
    """The complete configuration. Collective: all ranks must call it. Raises UserError on all."""
    settings = config.finetune
    if settings.task == "none":
        raise UserError(
            "finetune.task: none; this is a configuration of pre-training, use `d2v-ds train`, or "
            "start from a recipe of fine-tuning"
        )
    if len(config.modality) != 1:
        raise UserError(
            f"modality: fine-tuning needs exactly one, got {', '.join(config.modality) or 'none'}"
        )
    [name] = config.modality
    allowed = TASKS.get(name, ("classification", "regression"))
    if settings.task not in allowed:
        raise UserError(
            f"finetune.task: {settings.task} is not possible with modality {name} (allowed: "
            f"{', '.join(allowed)})"
        )
    stored = on_rank_0(lambda: stored_config(config))
    model, modality = config.model, config.modality[name]
    if stored is not None:
        model = merge(stored.model, model)
        modality = merge(stored.modality[name], modality)
    elif config.init:
        weights = open_weights(config.init)
        if name not in weights.modality:
            raise UserError(f"init: {config.init}: has {', '.join(weights.modality)}, not {name}")
        model = merge(weights.model, model)
        modality = merge(weights.modality[name], modality)
    elif "dim" not in model:
        raise UserError(
            "init: must be given: fine-tuning takes the encoder's settings from it, also with "
            "init_from=nothing; name a run, a checkpoint or an exported folder"
        )
    model = to_dict(decode(TransformerConfig, model, "model"))
    created = create_modalities({name: modality})[name]
    created.check_model(decode(TransformerConfig, model, "model"), predicts=False)
    modality = to_dict(created.config)
    config = dataclasses.replace(config, model=model, modality={name: modality})
    found = stored.finetune.labels if stored else on_rank_0(lambda: labels_of(config))
    metric = METRICS[settings.task] if settings.metric == "auto" else settings.metric
    return dataclasses.replace(
        config, finetune=dataclasses.replace(settings, labels=found, metric=metric)
    )


def stored_config(config: Config) -> Config | None:
    """The configuration in the run folder, if the run has a checkpoint."""
    run = RunFolder(config.run_dir)
    if not run.steps():
        return None
    with contextlib.suppress(UserError, KeyError):  # resuming then reports what differs
        stored = decode(Config, load_yaml(run.config))
        if stored.modality.keys() == config.modality.keys():
            return stored
    return None


# ------------------------------------------------------------------------------------------- labels


def create_labels(settings: FineTuning) -> Labels:
    """Raises UserError if the tokenizer cannot be read."""
    if settings.task == "regression":
        return Numbers()
    if settings.task == "classification":
        return Classes(settings.labels)
    if settings.tokenizer:
        return Pieces(settings.labels, settings.tokenizer)
    return Letters(settings.labels)


def labels_of(config: Config) -> tuple[str, ...]:
    """The labels of a run: those given, else those of the training set. Reads the labels of all
    local sets. Raises UserError for a sample whose label is missing or unknown."""
    settings = config.finetune
    local = {path: find(config, path) for path in every_set(config)}
    refuse_unusable(settings)
    names = settings.labels or collected(config, local)
    labels = create_labels(dataclasses.replace(settings, labels=names))
    for shards in local.values():
        if shards is not None and not shards.remote:
            for key, label in read_labels(shards, settings.label):
                try:
                    labels.encode(label)
                except ValueError as error:
                    raise UserError(
                        f"{shards.root}, sample {key!r}: {error}. Change the label, or list all of "
                        "them in finetune.labels"
                    ) from None
    return labels.names


def refuse_unusable(settings: FineTuning) -> None:
    """Raises UserError for given labels that no model can have."""
    given = settings.labels
    if given and settings.task == "ctc" and given[0] != BLANK:
        raise UserError(
            f"finetune.labels: the first label of CTC is the blank, got {given[0]!r}; begin the "
            f"list with {BLANK}"
        )
    if repeated := [name for i, name in enumerate(given) if name in given[:i]]:
        raise UserError(f"finetune.labels: {repeated[0]!r} is given twice; name each label once")


def every_set(config: Config) -> list[str]:
    """The training sets, then the held-out ones, without repetition."""
    return list(dict.fromkeys([*config.sources.values(), *config.valid_sources.values()]))


def find(config: Config, path: str) -> ShardSet | None:
    """A set; None if it consists of tars at URLs."""
    [name] = config.modality
    return None if stream_tars(path) else find_set(path, name)


def collected(config: Config, sets: dict[str, ShardSet | None]) -> tuple[str, ...]:
    """The labels that occur in the training sets."""
    settings = config.finetune
    if settings.task == "regression":
        return Numbers.names
    if settings.task == "ctc" and settings.tokenizer:
        return Pieces.collect(settings.tokenizer)
    training = {path: sets[path] for path in config.sources.values()}
    for path, shards in training.items():
        if shards is None or shards.remote:
            raise UserError(
                f"finetune.labels: must be given, because {path} is remote and reading all its "
                "labels would download all of it"
            )
    found: list[Any] = [
        label
        for shards in training.values()
        if shards is not None
        for _, label in read_labels(shards, settings.label)
    ]
    if settings.task == "ctc":
        names = Letters.collect(label for label in found if isinstance(label, str))
        problem = "all transcripts are empty" * (len(names) == 2)  # the blank and the boundary
    else:
        names = in_order({str(label) for label in found})
        problem = f"all labels are {names[0]!r}" * (len(names) == 1)
    if problem:
        raise UserError(
            f"{', '.join(training)}: {problem}, so there is nothing to learn; name another column "
            "with finetune.label, or list the labels in finetune.labels"
        )
    return names


def in_order(names: set[str]) -> tuple[str, ...]:
    """Class names sorted, as numbers if all of them are."""
    if all(name.removeprefix("-").isdecimal() for name in names):
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    return tuple(sorted(names))


def read_labels(shards: ShardSet, column: str) -> Iterator[tuple[str, Any]]:
    """(key, label) of every sample. Raises UserError for a sample without a label."""
    if "json" not in shards.fields:
        raise UserError(
            f"{shards.root}: its samples have no .json with labels; convert the corpus with labels"
        )
    for key, sample in read_samples(shards, ("json",)):
        try:
            yield key, label_of(metadata(sample), column)
        except ValueError as error:
            raise UserError(
                f"{shards.root}, sample {key!r}: {error}; convert with that column, or name "
                "another one with finetune.label"
            ) from None
