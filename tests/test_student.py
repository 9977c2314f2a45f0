"""Attention bias, initial values and the decoder of the student."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from d2v_ds import student
from d2v_ds.transformer import (
    TransformerConfig,
    Trunk,
)
from tests.helpers import variants
from tests.helpers.variants import batch_of


def test_extra_tokens_have_no_bias_and_padding_gets_no_attention() -> None:
    bias = student.attention_bias(
        torch.ones(1, 2, 3, 3), torch.tensor([[True, True, False]]), 1, torch.zeros(1, 4, 8)
    )
    assert bias is not None and bias.shape == (1, 2, 4, 4)
    assert (bias[0, 0, 0, :3] == 0).all() and (bias[0, 0, :, 0] == 0).all()
    assert (bias[0, 0, 1:, 1:3] == 1).all() and (bias[..., 3] == float("-inf")).all()
    assert student.attention_bias(None, None, 1, torch.zeros(1, 4, 8)) is None


def spread(tensor: Tensor) -> float:
    return float(tensor.detach().std())


def test_initialisation() -> None:
    torch.manual_seed(0)
    big = TransformerConfig(dim=128, depth=2, heads=2)
    bert, beit = (
        Trunk(big, 3, layer_drop=0.0),
        Trunk(dataclasses.replace(big, init="beit", norm="pre"), 3, layer_drop=0.0),
    )
    assert spread(bert.blocks[2].ffn.fc2.weight) == pytest.approx(0.02, rel=0.05)
    cut = 0.02 * 0.5396  # standard deviation of a normal truncated at one standard deviation
    assert spread(beit.blocks[2].ffn.fc1.weight) == pytest.approx(cut, rel=0.05)
    assert float(beit.blocks[2].ffn.fc1.weight.detach().abs().max()) <= 0.02
    for n in (1, 2, 3):  # depth of the block
        weight = beit.blocks[n - 1].ffn.fc2.weight
        assert spread(weight) == pytest.approx(cut / (2 * n) ** 0.5, rel=0.05)
    two, one = variants.build("v2_vision").student, variants.build("v1_vision").student
    assert spread(two.encoder.front_ends["vision"].extra.embedding) == pytest.approx(1, rel=0.3)
    assert float(one.encoder.front_ends["vision"].extra.embedding.detach().abs().max()) <= 0.02
    assert float(one.encoder.front_ends["vision"].mask_token.embedding.detach().abs().max()) <= 0.02
    front_end = variants.build("v1_speech").student.encoder.front_end("speech")
    token = front_end.mask_token.embedding.detach()  # type: ignore[union-attr]
    assert 0 <= float(token.min()) and float(token.max()) <= 1 and float(token.std()) > 0.2
    text = variants.build("v2_text").student
    assert not text.encoder.front_ends["text"].features.tokens.weight[1].any()  # padding
    assert spread(text.predictors["text"].proj[0].weight) == pytest.approx(0.02, rel=0.1)
    assert not text.predictors["text"].proj[0].bias.any()
    assert variants.build("v2_speech").student.predictors["speech"].proj.bias.any()  # torch's


def test_a_decoder_with_an_even_kernel_keeps_the_length() -> None:
    task = variants.build("v2_text", "modality.text.decoder.kernel=4")
    loss, _ = task(batch_of(task, 20, 30), 1)
    assert torch.isfinite(loss)
