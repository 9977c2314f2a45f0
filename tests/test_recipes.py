"""The named runs: the numbers of the published models, and what compat=fairseq sets."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from d2v_ds import recipes
from d2v_ds.config import Config
from d2v_ds.pretrain import Pretrain
from tests.helpers import variants

COUNTS = [  # of student, teacher and predictor, fixed positions with them
    ("speech_base", 93_783_308, 88_561_932, 619_776),
    ("speech_large", 315_184_144, 308_542_480, 1_908_736),
    ("vision_base", 88_383_744, 85_797_888, 2_585_856),
    ("vision_large", 309_268_480, 303_300_608, 5_967_872),
    ("vision_huge", 637_403_392, 630_763_520, 6_639_872),
    ("text_base", 152_961_792, 85_054_464, 28_907_520),
    ("text_large", 385_379_584, 302_309_376, 31_070_464),
    ("speech_base_v1", 93_754_880, 85_056_000, 590_592),
]


def size(module: nn.Module) -> int:
    return sum(tensor.numel() for tensor in (*module.parameters(), *module.buffers()))


@pytest.mark.parametrize(("recipe", "student_size", "teacher_size", "predictor"), COUNTS)
def test_parameter_counts_are_the_published_ones(
    recipe: str, student_size: int, teacher_size: int, predictor: int
) -> None:
    """Counted in facebookresearch/fairseq at 3d262bb; the teacher's is what is averaged there."""
    with torch.device("meta"):
        task = Pretrain.create(recipes.load(recipe, []))
    assert size(task.student) == student_size
    assert size(task.teacher) == teacher_size
    assert size(task.student.predictors) == predictor


@pytest.mark.parametrize(
    ("recipe", "encoder"),
    [
        ("speech_base_v1", 93_164_288),
        ("vision_base_v1", 85_666_128),
        ("vision_large_v1", 303_137_216),
    ],
)
def test_encoders_of_one_count_as_in_transformers(recipe: str, encoder: int) -> None:
    with torch.device("meta"):
        task = Pretrain.create(recipes.load(recipe, []))
    assert size(task.student.encoder) == encoder


@pytest.mark.parametrize("recipe", recipes.RECIPES)
def test_every_recipe_builds(recipe: str) -> None:
    with torch.device("meta"):
        task = Pretrain.create(recipes.load(recipe, []))
    assert [w for modality in task.modalities.values() for w in modality.warnings()] == []
    assert len(task.modalities) == (3 if recipe.startswith("joint") else 1)


def test_masked_tokens_of_the_published_recipes() -> None:
    """Counted in the original code."""

    def of(recipe: str, length: int) -> int | None:
        modality = variants.modality_of(build_on_meta(recipes.load(recipe, [])))
        masked = modality.masked_tokens(length)
        return None if masked is None else masked // modality.views

    assert of("speech_base", 240_000) == 374 and of("speech_large", 240_000) == 411
    assert of("vision_base", 1) == 157 and of("vision_large", 1) == 147
    assert of("vision_huge", 1) == 192 and of("vision_huge16", 1) == 147
    assert of("text_base", 64) == 31 and of("text_base", 512) == 246
    assert [of(f"{name}_base_v1", 300) for name in ("speech", "vision", "text")] == [None] * 3


def build_on_meta(config: Config) -> Pretrain:
    with torch.device("meta"):
        return Pretrain.create(config)


# ----------------------------------------------------------------------------------- compat


def test_compat_sets_every_flag_and_gives_way_to_what_is_said_beside_it() -> None:
    load: Callable[..., Config] = lambda recipe, *more: recipes.load(recipe, list(more))  # noqa: E731
    for recipe in ("speech_base", "vision_base", "text_base", "text_base_v1"):
        plain, faithful = load(recipe), load(recipe, "compat=fairseq")
        assert (plain.optim.decay_all, plain.optim.adam_eps) == (False, "torch")
        assert (faithful.optim.decay_all, faithful.optim.adam_eps) == (True, "fairseq")
        build_on_meta(faithful)
    assert load("speech_base", "compat=fairseq").modality["speech"]["padded_statistics"] is True
    assert load("vision_base", "compat=fairseq").modality["vision"]["cls_views"] is None
    text = load("text_base_v1", "compat=fairseq").modality["text"]
    assert text["text_teacher"] == "masked" and text["padded_statistics"] is True
    assert "text_teacher" not in load("text_base", "compat=fairseq").modality["text"]
    kept = load("text_base_v1", "modality.text.text_teacher=whole", "compat=fairseq")
    assert kept.modality["text"]["text_teacher"] == "whole" and kept.optim.decay_all
