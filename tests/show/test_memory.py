"""Memory estimated on the meta device, compared with the measurements of a CPU's allocator."""

from __future__ import annotations

import pytest
import torch

from d2v_ds import recipes
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
def test_activations_are_estimated(recipe: str, again: bool) -> None:
    # Attention dropout keeps the CPU from its fused kernel, which it would use without a learned
    # bias. The estimate without `fused` is for plain operations.
    settings = [f"model.checkpoint_activations={again}".lower(), "model.attention_dropout=0.1"]
    modality = recipe.partition("_")[0]
    real = build(recipe, *settings)
    measured, seconds = measured_activations(real, largest_batch(real, modality, 6))
    task = build(recipe, *settings, device="meta")
    estimated = activation_bytes(task, largest_batch(task, modality, 6), torch.float32, fused=False)
    print(f"{recipe}: {estimated / 1e6:.1f} MB estimated, {measured / 1e6:.1f} MB measured")
    assert estimated == pytest.approx(measured, rel=0.15) and seconds > 0


def test_checkpointing_and_fused_attention_save_memory() -> None:
    task = build("speech_base", device="meta")
    batch = largest_batch(task, "speech", 2)
    plain, fused = (activation_bytes(task, batch, torch.bfloat16, fused=on) for on in (False, True))
    for module in task.modules():
        if isinstance(module, Trunk):
            module.checkpoint_activations = True
    saved = activation_bytes(task, batch, torch.bfloat16, fused=True)
    assert saved < 0.6 * fused < 0.6 * 0.6 * plain


def test_only_live_allocations_are_counted() -> None:
    given = torch.nn.Linear(10, 10)  # allocated before, so not counted
    with PeakMemory(given) as memory, torch.no_grad():
        x = given(torch.ones(25, 10))  # frees the input: 1000 bytes, and 1000 for the output
        y = x[3:].view(-1)
        x.add_(1)
        del x
        y = y * 2  # 880 more
    assert (memory.now, memory.peak) == (880, 2000)


def test_state_by_formula() -> None:
    # In bf16, 16 bytes per trained parameter and 8 + 2 bytes per averaged one
    assert state_bytes(1000, 800, 0, 4, 2) == 16 * 1000 + 10 * 800
    assert state_bytes(1000, 800, 1, 4, 2) == (12 * 1000 + 8 * 800) // 4 + 4 * 1000 + 2 * 800
    assert state_bytes(1000, 800, 2, 4, 2) == (14 * 1000 + 8 * 800) // 4 + 2 * 1000 + 2 * 800
    assert state_bytes(1000, 800, 3, 4, 2) == (16 * 1000 + 10 * 800) // 4
    assert state_bytes(1000, 800, 0, 4, 4) == 16 * 1000 + 12 * 800
    assert checkpoint_bytes(1000, 800) == 12 * 1000 + 8 * 800
    P, A = sizes(build("speech_tiny"))
    assert P > A > 0
