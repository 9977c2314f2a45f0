"""Checks of values and across settings; every error names its setting."""

from __future__ import annotations

import pytest

from d2v_ds import recipes
from d2v_ds.config import Config, modality_of
from d2v_ds.config.config import require_divisible, require_one_each
from d2v_ds.errors import UserError
from d2v_ds.pretrain import Pretrain
from tests.config.helpers import load


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.steps=0", "run.steps: must be at least 1, got 0"),
        ("run.threads=-1", "run.threads: must be 0 or more, got -1"),
        ("data.workers=-1", "data.workers: must be 0 or more, got -1"),
        ("data.max_bad=1.1", "data.max_bad: must be in [0, 1], got 1.1"),
        ("batch.size=0", "batch.size: must be above 0, got 0"),
        ("batch.micro_batches=0", "batch.micro_batches: must be at least 1, got 0"),
        ("optim.lr=-1", "optim.lr: must be above 0, got -1.0"),
        ("optim.lr_end=1", "optim.lr_end: must be in [0, optim.lr=0.001], got 1.0"),
        ("optim.clip=-1", "optim.clip: must be 0 (off) or more, got -1.0"),
        ("optim.betas=[0.9, 1]", "optim.betas[1]: must be in [0, 1), got 1.0"),
        ("optim.warmup_steps=401", "optim.warmup_steps: must be in [0, run.steps=400], got 401"),
        ("teacher.decay=1.5", "teacher.decay: must be in [0, 1], got 1.5"),
        ("teacher.decay_end=-1", "teacher.decay_end: must be in [0, 1], got -1.0"),
        ("teacher.anneal_steps=-1", "teacher.anneal_steps: must be 0 or more, got -1"),
        ("target.top_k=0", "target.top_k: must be at least 1, got 0"),
        ("log.every=0", "log.every: must be at least 1, got 0"),
        ("save.every=0", "save.every: must be at least 1, got 0"),
        ("save.keep=0", "save.keep: must be at least 1, got 0"),
        ("save.keep_every=150", "save.keep_every: must be 0 (off) or a multiple of save.every=100"),
        (
            "data.shards.text=/a",
            "data.shards.text: no modality 'text' in this run (it has: speech)",
        ),
        (
            "batch.size={text: 1}",
            "batch.size.text: no modality 'text' in this run (it has: speech)",
        ),
        ("data.weights.text=1", "data.weights.text: no such source in this run (it has: speech)"),
        ("data.weights.speech=0", "data.weights.speech: must be above 0, got 0"),
    ],
)
def test_a_value_out_of_range_is_named_with_what_is_allowed(override: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load(override)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.deep=3", "model.deep: no such setting; did you mean 'depth'?"),
        ("model.heads=3", "model: dim=128 is not divisible by heads=3"),
        ("model.dropout=1", "model.dropout: must be in [0, 1), got 1.0"),
        ("modality.speech.mask.pr=1", "modality.speech.mask.pr: no such setting"),
        ("modality.speech.mask.prob=1", "modality.speech.mask.prob: must be in (0, 1), got 1.0"),
        ("modality.speech.convs=[[1, 2]]", "modality.speech.convs[0]: expected 3 values, got 2"),
        ("modality.speech.shared=[conv]", "modality.speech: shared: no part 'conv'"),
        ("modality.smell={}", "modality.smell: no such modality (allowed: speech, text, vision)"),
        ("target.top_k=9", "target.top_k: 9 exceeds model.depth=4; lower it"),
        ("modality.speech.mask.prob=1e-4", "modality.speech.mask.prob: 0.0001 masks 0 of the 100"),
        ("modality.speech.decoder.groups=3", "modality.speech.decoder.groups: 3 does not divide"),
        ("modality.speech.positions.groups=3", "modality.speech.positions.groups: 3 does not div"),
    ],
)
def test_a_wrong_model_setting_is_named(override: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        Pretrain.create(load(override))
    assert str(caught.value).startswith(message)


def test_one_shard_set_or_one_for_each_modality() -> None:
    assert load("data.shards=/a").sources == {"speech": "/a"}
    assert load("data.shards.speech=/b").sources == {"speech": "/b"}
    two = load(
        "data.shards={speech/x: /c, speech/y: /d}", "data.weights={speech/x: 1, speech/y: 2}"
    )
    assert list(two.sources) == ["speech/x", "speech/y"] and two.batch_size("speech") == 8.05
    assert modality_of("speech/x") == modality_of("speech") == "speech"


def test_several_modalities_need_a_size_and_a_set_each() -> None:
    require_one_each(load("data.shards=/a"))
    require_one_each(recipes.load("joint_tiny", []))
    for override in ("data.shards=/a", "batch.size=8", "batch.size={speech: 8, text: 8}"):
        with pytest.raises(UserError, match=r"^(data\.shards|batch\.size)"):
            require_one_each(recipes.load("joint_tiny", [override]))


def test_the_run_folder() -> None:
    assert str(Config().run_dir) == "runs/run"
    assert str(load().run_dir) == "runs/speech_tiny"
    assert str(load("run.dir=/a/b", "run.name=c").run_dir) == "/a/b"


@pytest.mark.parametrize(
    ("micro_batches", "ranks", "advice"),
    [
        (6, 4, "Use 4, 8 or 12, or 1, 2, 3 or 6 ranks."),
        (2, 3, "Use 3, 6 or 9, or 1 or 2 ranks."),
        (1, 2, "Use 2, 4 or 6, or 1 rank."),
    ],
)
def test_ranks_must_divide_the_micro_batches(micro_batches: int, ranks: int, advice: str) -> None:
    require_divisible(ranks * micro_batches, ranks)
    with pytest.raises(UserError) as caught:
        require_divisible(micro_batches, ranks)
    assert str(caught.value) == (
        f"batch.micro_batches: {micro_batches} is not divisible by {ranks} ranks. {advice}"
    )
