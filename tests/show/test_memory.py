"""The memory that is foretold on the meta device against what a CPU's allocator hands out."""

from __future__ import annotations

import re

import pytest
import torch

from d2v_ds import recipes, show
from d2v_ds.errors import UserError
from d2v_ds.pretrain import Pretrain
from d2v_ds.show.memory import (
    PeakMemory,
    activation_bytes,
    checkpoint_bytes,
    largest_batch,
    measured_activations,
    sizes,
    state_bytes,
)
from d2v_ds.transformer import Trunk


def build(recipe: str, *overrides: str, device: str = "cpu") -> Pretrain:
    torch.manual_seed(0)
    with torch.device(device):
        return Pretrain.create(recipes.load(recipe, list(overrides))).train()


@pytest.mark.parametrize("again", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("recipe", ["speech_tiny", "speech_tiny_v1", "vision_tiny", "text_tiny"])
def test_activations_are_foretold(recipe: str, again: bool) -> None:
    # Dropout of the attention weights, which rules out the CPU's fused kernel where there is no
    # learned bias: the estimate without `fused` is of plain operations.
    settings = [f"model.checkpoint_activations={again}".lower(), "model.attention_dropout=0.1"]
    modality = recipe.partition("_")[0]
    real = build(recipe, *settings)
    measured, seconds = measured_activations(real, largest_batch(real, modality, 6))
    task = build(recipe, *settings, device="meta")
    foretold = activation_bytes(task, largest_batch(task, modality, 6), torch.float32, fused=False)
    print(f"{recipe}: {foretold / 1e6:.1f} MB foretold, {measured / 1e6:.1f} MB measured")
    assert foretold == pytest.approx(measured, rel=0.15) and seconds > 0


def test_checkpointing_and_fused_attention_save_memory() -> None:
    task = build("speech_base", device="meta")
    batch = largest_batch(task, "speech", 2)
    plain, fused = (activation_bytes(task, batch, torch.bfloat16, fused=on) for on in (False, True))
    for module in task.modules():
        if isinstance(module, Trunk):
            module.checkpoint_activations = True
    saved = activation_bytes(task, batch, torch.bfloat16, fused=True)
    assert saved < 0.6 * fused < 0.6 * 0.6 * plain


@pytest.mark.parametrize(
    ("recipe", "samples"), [("vision_base", 20), ("vision_base", 40), ("text_base_v1", 9)]
)
def test_the_largest_micro_batch_fits_and_few_more_do_not(recipe: str, samples: int) -> None:
    """For text with checkpointing the gradient of the embedding is most of a small batch's need."""
    task, modality = build(recipe, device="meta"), recipe.partition("_")[0]
    needed = show.activations(task, modality, 2, 12, recipe.startswith("text"))
    batch = largest_batch(task, modality, samples)
    room = activation_bytes(task, batch, torch.bfloat16, fused=True)
    assert 0.75 * samples <= show.most_samples(needed, room) <= samples


def test_most_samples() -> None:
    needed = {1: 100, 8: 100, 16: 180}
    rooms = (99, 100, 109, 110, 180, 1000)
    assert [show.most_samples(needed, room) for room in rooms] == [0, 8, 8, 9, 16, 98]


def test_only_what_lives_is_counted() -> None:
    given = torch.nn.Linear(10, 10)  # was there before
    with PeakMemory(given) as memory, torch.no_grad():
        x = given(torch.ones(25, 10))  # the input goes: 1000 bytes, and 1000 of the output
        y = x[3:].view(-1)
        x.add_(1)
        del x
        y = y * 2  # a further 880
    assert (memory.now, memory.peak) == (880, 2000)


def test_state_by_formula() -> None:
    # 16 + 2 bytes a parameter trained, 8 + 2 a parameter averaged, in bf16
    assert state_bytes(1000, 800, 0, 4, 2) == 16 * 1000 + 10 * 800
    assert state_bytes(1000, 800, 1, 4, 2) == (12 * 1000 + 8 * 800) // 4 + 4 * 1000 + 2 * 800
    assert state_bytes(1000, 800, 2, 4, 2) == (14 * 1000 + 8 * 800) // 4 + 2 * 1000 + 2 * 800
    assert state_bytes(1000, 800, 3, 4, 2) == (16 * 1000 + 10 * 800) // 4
    assert state_bytes(1000, 800, 0, 4, 4) == 16 * 1000 + 12 * 800
    assert checkpoint_bytes(1000, 800) == 12 * 1000 + 8 * 800
    P, A = sizes(build("speech_tiny"))
    assert P > A > 0


def test_show_tells_what_fits() -> None:
    config = recipes.load("speech_base", [])
    text = show.describe(config, 8, 80 * 2**30)
    assert "smallest stage for it: engine.config=zero0" in text
    assert "a checkpoint takes 1.83 GB of disk" in text
    assert "it fits at no stage" in show.describe(config, 8, 2**30)
    narrow = show.describe(recipes.load("speech_large", []), 48, 8 * 2**30)
    assert "smallest stage for it: engine.config=zero2" in narrow
    assert "GiB, 10% of it" not in show.describe(config, 8)


def test_show_measures_the_longest_micro_batch() -> None:
    config = recipes.load("speech_tiny", [])
    text = show.describe(config, 2, 2**30, measure=True)
    [line] = [line for line in text.splitlines() if line.startswith("speech: measured")]
    found = re.fullmatch(
        r"speech: measured on this machine's cpu in fp32: a micro-batch of 2.005 s takes (\S+) GiB "
        r"of activations and (\S+) s",
        line,
    )
    assert found, line
    assert 0.01 < float(found[1]) < 1 and float(found[2]) > 0
    assert "smallest stage for it: engine.config=zero0" in text
    alone = show.describe(config, 2, measure=True)
    assert "speech: measured" in alone and "smallest stage" not in alone
    with pytest.raises(UserError, match="fp16 needs a GPU"):
        show.describe(recipes.load("speech_tiny", ["engine.precision=fp16"]), 2, measure=True)
