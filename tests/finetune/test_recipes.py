"""The published recipes of fine-tuning, against numbers typed in from the original configurations
and from the formulas of their schedules."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from d2v_ds import recipes
from d2v_ds.config import Config
from d2v_ds.config.decoding import merge
from d2v_ds.finetune import Finetune
from d2v_ds.pretrain import Pretrain
from d2v_ds.schedules import learning_rate

LETTERS = ["<blank>", "|", *"abcdefghijklmnopqrstuvwxyz'"]

# fairseq examples/wav2vec/config/finetuning: lr, max_update, distributed_world_size, max_tokens,
# update_freq, mask_prob, mask_channel_prob, layerdrop, freeze_finetune_updates
WAV2VEC = """
base_10m   5e-5  13000 2  3200000 4  .65 .25 .1  10000
base_1h    5e-5  13000 2  3200000 4  .65 .25 .1  10000
base_10h   5e-5  20000 2  3200000 4  .65 .5  .05 10000
base_100h  3e-5  80000 2  3200000 4  .65 .5  .1  0
base_960h  1e-4 320000 8  3200000 1  .5  .1  .1  0
vox_10m    1e-4  13000 4  1280000 5  .65 .25 .1  10000
vox_1h     3e-4  13000 4  1280000 5  .75 .25 .1  10000
vox_10h    1e-4  20000 4  1280000 5  .75 .25 .1  10000
vox_100h   3e-5  80000 4  1280000 5  .5  .5  .1  10000
vox_960h   3e-5 320000 24 1280000 1  .5  .25 .1  10000
"""
# the same: lr, max_update, warm-up, decay (0: cosine), world size, max_tokens, update_freq,
# mask_prob, mask_length, mask_channel_prob
LATER = """
vox_10m_2   2e-6  10000 1000      0  4 1000000 4 .4  3 .25
vox_1h_2    1e-5  60000 4000      0  8 1000000 1 .65 5 .25
vox_10h_2   2e-5  60000 8000      0  4 1280000 1 .5  5 .1
vox_10h_aws 2e-5  60000 8000  72000  4 1280000 1 .4  5 .1
vox_100h_2  1e-5 100000 8000  72000  8 1280000 1 .4  5 .1
vox_100h_3  1e-5 100000 8000      0  8 1000000 1 .4  5 .1
vox_960h_2  1e-5 200000 8000 200000 16 1000000 1 .4  5 .1
vox_960h_3  1e-5 200000 8000      0 16 1000000 1 .4  5 .1
"""
# fairseq examples/data2vec/config/v2/text_finetuning: metric, batch_size, warm-up, max_update, lr
GLUE = """
cola matthews         16   320   5336 2e-5
mnli accuracy         32  7432 123873 2e-5
mrpc accuracy_f1      16   137   2296 2e-5
qnli accuracy         32  1986  33112 2e-5
qqp  accuracy_f1      32 28318 113272 2e-5
rte  accuracy         16   122   2036 2e-5
sst2 accuracy         32  1256  20935 2e-5
stsb pearson_spearman 16   214   3598 4e-5
"""


def table(text: str) -> list[tuple[str, list[float | str]]]:
    return [
        (name, [number(w) for w in row]) for name, *row in map(str.split, text.split("\n")[1:-1])
    ]


def number(word: str) -> float | str:
    return word if word[0].isalpha() else float(word)


def load(name: str, encoder: str, labels: Sequence[str]) -> Config:
    """A recipe with the model and modality of an encoder, as `init` would give them, and labels."""
    config, source = recipes.load(name, []), Pretrain.resolve(recipes.load(encoder, []))
    [(modality, own)] = config.modality.items()
    return dataclasses.replace(
        config,
        model=merge(source.model, config.model),
        modality={modality: merge(source.modality[modality], own)},
        finetune=dataclasses.replace(config.finetune, labels=tuple(labels)),
    )


def create(config: Config) -> Finetune:
    with torch.device("meta"):
        return Finetune.create(config)


def rates(config: Config, *steps: float) -> list[float]:
    return [learning_rate(config.optim, config.run.steps, int(n)) for n in steps]


# ------------------------------------------------------------------------------------------- speech


def of_speech(config: Config, name: str) -> None:
    tune, optim = config.finetune, config.optim
    assert (tune.task, tune.freeze, tune.channel_mask_length) == ("ctc", "convolutions", 64)
    assert (optim.eps, optim.weight_decay, optim.clip) == (1e-8, 0, 0), name
    dropouts = ("dropout", "attention_dropout", "activation_dropout")
    assert [config.model[key] for key in dropouts] == [0, 0, 0.1]
    assert config.modality["speech"]["prenet_dropout"] == tune.head_dropout == 0
    assert config.modality["speech"]["prenet_layer_drop"] == config.model["layer_drop"]


@pytest.mark.parametrize(("name", "row"), table(WAV2VEC))
def test_recipes_of_wav2vec(name: str, row: list[float]) -> None:
    lr, steps, gpus, tokens, accumulation, mask, channels, layer_drop, frozen = row
    config = load(f"ctc_{name}", "speech_base_v1", labels=LETTERS)
    of_speech(config, name)
    assert config.batch.size == pytest.approx(gpus * tokens * accumulation / 16_000)
    assert config.batch.micro_batches == gpus * accumulation
    tune = config.finetune
    assert (tune.time_mask, tune.time_mask_length, tune.time_mask_with) == (mask, 10, "token")
    assert (tune.channel_mask, tune.freeze_steps) == (channels, frozen)
    assert config.model["layer_drop"] == layer_drop and config.run.steps == steps
    assert config.optim.betas == (0.9, 0.98)
    # phase_ratio [.1, .4, .5], init_lr_scale .01, final_lr_scale .05
    middle = 0.75 * steps
    assert rates(config, 0, 0.05 * steps, 0.1 * steps, 0.5 * steps, middle, steps) == pytest.approx(
        [0.01 * lr, (0.01 + 0.99 / 2) * lr, lr, lr, lr * 0.05**0.5, 0.05 * lr], rel=1e-3
    )
    task = create(config)
    assert task.head.proj.weight.shape == (len(LETTERS), 768)  # type: ignore[union-attr]
    frozen_names = [n for n, _ in task.named_parameters() if task.part(n) == "frozen"]
    features = "encoder.front_ends.speech.features."
    assert len([n for n in frozen_names if n.startswith(features)]) == 3 * 7
    assert task.part(f"{features}proj.weight") == task.part(f"{features}norm.weight") == "speech"


@pytest.mark.parametrize(("name", "row"), table(LATER))
def test_later_recipes_of_speech(name: str, row: list[float]) -> None:
    lr, steps, warmup, decay, gpus, tokens, accumulation, mask, length, channels = row
    config = load(f"ctc_{name}", "speech_base", labels=LETTERS)
    of_speech(config, name)
    assert config.batch.size == pytest.approx(gpus * tokens * accumulation / 16_000)
    assert config.batch.micro_batches == gpus * accumulation
    tune, first = config.finetune, name == "vox_10m_2"
    assert (tune.time_mask, tune.time_mask_length, tune.channel_mask) == (mask, length, channels)
    assert tune.time_mask_with == ("zero" if first else "noise") and tune.freeze_steps == 100
    assert config.optim.betas == ((0.9, 0.95) if first else (0.9, 0.98))
    assert config.model["layer_drop"] == 0.1 and config.run.steps == steps
    if decay:
        middle, end = warmup + decay / 2, warmup + decay
        expected = [(0.01 + 0.99 / 2) * lr, lr, lr * 0.05**0.5, 0.05 * lr]
        assert rates(config, warmup / 2, warmup, middle, end) == pytest.approx(expected)
    else:
        middle = warmup + (steps - warmup) / 2
        found = rates(config, 0, warmup / 2, warmup, middle, steps)
        assert found == pytest.approx([0, lr / 2, lr, lr / 2, 0], abs=1e-12)
    create(config)


# ------------------------------------------------------------------------------------------- vision

MIXED = {"mixup": 0.7, "cutmix": 1.0, "mix_prob": 0.9, "mix_switch": 0.5, "head_std": 0.02}
MIXED_V1 = {"mixup": 0.8, "cutmix": 1.0, "mix_prob": 1.0, "mix_switch": 0.5, "head_std": 2e-5}
# lr, updates, warm-up, min_lr, layer decay, drop path, clip, weight decay
IMAGENET = [
    ("base", 1e-3, 250_200, 16_000, 1e-6, 0.65, 0.1, 0, 0.05),
    ("large", 5e-4, 125_200, 16_000, 1e-7, 0.75, 0.2, 4, 0.05),
    ("huge", 5e-4, 125_200, 16_000, 1e-20, 0.75, 0.2, 4, 0.05),
    # run_class_finetuning.py: 100 and 50 epochs of 1,281,167 // 1,024 steps
    ("base_v1", 4e-3, 100 * 1251, 10 * 1251, 1e-6, 0.65, 0.2, 0, 0.0),
    ("large_v1", 5e-3, 50 * 1251, 5 * 1251, 1e-6, 0.65, 0.25, 0, 0.05),
]


@pytest.mark.parametrize("row", IMAGENET, ids=lambda row: row[0])
def test_recipes_of_vision(row: tuple[Any, ...]) -> None:
    size, lr, steps, warmup, lr_end, decay, drop_path, clip, weight_decay = row
    first = size.endswith("_v1")
    config = load(f"imagenet_{size}", f"vision_{size}", labels=[*map(str, range(1000))])
    tune, optim, vision = config.finetune, config.optim, config.modality["vision"]
    assert (config.batch.size, config.run.steps) == (1024 if first else 512, steps)
    for name, value in (MIXED_V1 if first else MIXED).items():
        assert getattr(tune, name) == value, name
    assert (tune.label_smoothing, tune.erase, tune.augment) == (0.1, 0.25, "rand")
    assert (vision["crop_scale"], vision["jitter"]) == ([0.08, 1.0], 0.0)
    assert config.model["drop_path"] == drop_path
    assert config.model["dropout"] == config.model["attention_dropout"] == 0
    assert (optim.clip, optim.weight_decay, optim.eps) == (clip, weight_decay, 1e-8)
    assert optim.betas == ((0.9, 0.999) if first else (0.9, 0.95))
    middle = (lr + lr_end) / 2
    found = rates(config, 0, warmup - 1, warmup, warmup + (steps - warmup) / 2, steps)
    last = lr if first else lr * (warmup - 1) / warmup  # BEiT's warm-up ends a step earlier
    assert found == pytest.approx([0, last, lr, middle, lr_end], rel=1e-3, abs=1e-19)
    task = create(config)
    L = config.model["depth"]
    # Clark et al. 2020 as in BEiT: decay ** (L + 1 - layer), the embeddings being layer 0
    assert task.lr_scale("head.proj.weight") == 1
    for i in (0, L // 2, L - 1):
        scale = task.lr_scale(f"encoder.trunk.blocks.{i}.attention.qkv.weight")
        assert math.isclose(scale, decay ** (L - i))
    patches = task.lr_scale("encoder.front_ends.vision.features.proj.weight")
    assert math.isclose(patches, decay ** (L + 1) if first else 1)
    assert task.lr_scale("encoder.front_ends.vision.bias.table") == 1
    assert {type(m).__name__ for m in task.head.children()} == {"LayerNorm", "Dropout", "Linear"}


# --------------------------------------------------------------------------------------------- text


@pytest.mark.parametrize(("name", "row"), table(GLUE))
def test_recipes_of_text(name: str, row: list[Any]) -> None:
    metric, batch, warmup, steps, lr = row
    regression = name == "stsb"
    labels = ("value",) if regression else ("0", "1")
    config = load(f"glue_{name}", "text_base", labels=labels)
    tune, optim = config.finetune, config.optim
    assert (tune.task, tune.metric) == ("regression" if regression else "classification", metric)
    assert (tune.bos_id, tune.head_dropout, tune.pool) == (0, 0, "auto")
    assert config.run.steps == steps
    assert (optim.betas, optim.eps, optim.weight_decay, optim.clip) == ((0.9, 0.98), 1e-6, 0.1, 0)
    found = rates(config, 0, warmup, (warmup + steps) / 2, steps)
    assert found == pytest.approx([0, lr, lr / 2, 0], rel=1e-2, abs=1e-12)
    source = Pretrain.resolve(recipes.load("text_base", []))
    assert config.model == source.model and config.modality == source.modality
    task = create(config)
    assert task.head.dense.weight.shape == (768, 768)  # type: ignore[union-attr]
    # batch.size counts texts, whatever their length
    [modality] = task.modalities.values()
    assert (modality.cost(3), modality.cost(5000), modality.batch_unit) == (1, 1, "samples")
    assert config.batch.size == batch


# --------------------------------------------------------------------------------------- everything


def test_every_recipe_is_in_a_table() -> None:
    names = {f"ctc_{name}" for name, _ in [*table(WAV2VEC), *table(LATER)]}
    names |= {f"imagenet_{row[0]}" for row in IMAGENET} | {f"glue_{n}" for n, _ in table(GLUE)}
    published = {n for n in recipes.GROUPS["fine-tuning"] if not n.startswith("finetune_")}
    assert names == published


@pytest.mark.parametrize("name", recipes.GROUPS["fine-tuning"])
def test_every_recipe_has_a_name_and_a_summary(name: str) -> None:
    assert recipes.RECIPES[name].__name__ == name and recipes.summary(name).endswith(".")
    config = recipes.load(name, [])
    assert config.run.name == name and config.finetune.task != "none"
    assert config.save.every % config.valid.every == 0 and config.save.keep_best == 1
    assert recipes.RECIPES[name]() == recipes.RECIPES[name](), "recipes must not share mappings"
    changed = recipes.RECIPES[name]()
    changed["optim"]["lr"] = 0
    assert recipes.RECIPES[name]()["optim"]["lr"] > 0
