"""The recipes load, match the parameter counts of the published models and have the right class
tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from d2v_ds import recipes
from d2v_ds.config import Config
from d2v_ds.config.decoding import dump_yaml
from d2v_ds.errors import UserError
from d2v_ds.pretrain import Pretrain
from tests.helpers import variants

PRETRAINING = list(recipes.GROUPS["pre-training"])
COUNTS = [  # parameters of student, teacher and predictor, including fixed positions
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
    """Counted in facebookresearch/fairseq at 3d262bb. The teacher's count is its averaged part."""
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
def test_encoders_of_1_0_have_the_parameter_counts_of_transformers(
    recipe: str, encoder: int
) -> None:
    with torch.device("meta"):
        task = Pretrain.create(recipes.load(recipe, []))
    assert size(task.student.encoder) == encoder


@pytest.mark.parametrize("recipe", PRETRAINING)
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


# ----------------------------------------------------------------------------------- loading


@pytest.mark.parametrize("name", PRETRAINING)
def test_a_recipe_resolves_and_its_file_starts_the_same_run(name: str, tmp_path: Path) -> None:
    config = Pretrain.resolve(recipes.load(name, ["data.shards=/somewhere"]))
    path = tmp_path / "config.yaml"
    path.write_text(dump_yaml(config))
    assert Pretrain.resolve(recipes.load(str(path), [])) == config
    assert config.run.name == name and recipes.summary(name).endswith(".")


def test_an_unknown_recipe_or_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'speech_tin': no such recipe; did you mean 'speech_tiny'"):
        recipes.load("speech_tin", [])
    with pytest.raises(UserError, match=r"none\.yaml: no such file"):
        recipes.load("none.yaml", [])
    with pytest.raises(UserError, match="runs/a: no such file"):
        recipes.load("runs/a", [])


def test_a_modality_can_be_removed_from_a_joint_recipe() -> None:
    config = recipes.load("joint_tiny", ["modality.text=null", "data.shards.text=/a"])
    assert set(config.modality) == set(config.data.weights) == {"speech", "vision"}
    assert config.batch.size == {"speech": 8.05, "vision": 32.0} and config.data.shards == {}


@pytest.mark.parametrize("name", PRETRAINING)
def test_class_tokens_match_the_published_models(name: str) -> None:
    """Only images have a class token, and only 2.0 trains it."""
    for modality, settings in Pretrain.resolve(recipes.load(name, [])).modality.items():
        assert settings["extra_tokens"] == (1 if modality == "vision" else 0)
        trained = name in ("vision_base", "vision_large", "vision_huge", "vision_huge16")
        trained = trained or (name, modality) == ("joint_base", "vision")
        assert settings["cls_weight"] == (0.01 if trained else 0.0)
