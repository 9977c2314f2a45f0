"""Blocks, position biases and the trunk."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from d2v_ds.transformer import (
    Alibi,
    Block,
    RelativeBias,
    TransformerConfig,
    Trunk,
    alibi_slopes,
)


def test_alibi_slopes_and_bias() -> None:
    expected = [2.0**-i for i in range(1, 9)] + [2.0 ** (-i - 0.5) for i in range(4)]
    assert alibi_slopes(12) == pytest.approx(expected)
    assert alibi_slopes(6) == pytest.approx([0.25, 0.0625, 2**-6, 2**-8, 0.5, 0.125])
    alibi = Alibi(4)
    with torch.no_grad():
        alibi.scale.copy_(torch.tensor([1.0, 2.0, -1.0, 0.5]))
    bias = alibi(torch.tensor([[3, 10]]))  # visible tokens keep their original distance
    slopes = torch.tensor(alibi_slopes(4))
    scale = torch.tensor([1.0, 2.0, 0.0, 0.5])  # clamped at 0
    torch.testing.assert_close(bias[0, :, 0, 1], -7 * slopes * scale)
    assert (bias[0, :, [0, 1], [0, 1]] == 0).all()


def test_relative_bias_has_one_value_per_offset() -> None:
    bias = RelativeBias((2, 3), heads=1)
    n = len(bias.table)
    assert n == 3 * 5 + 3
    with torch.no_grad():
        bias.table.copy_(torch.arange(float(n))[:, None])
    table = bias(torch.arange(6)[None])[0, 0].detach()  # [7, 7], the class token first
    assert table[0, 0] == n - 1 and (table[0, 1:] == n - 3).all() and (table[1:, 0] == n - 2).all()
    patches = table[1:, 1:]
    offsets: dict[tuple[int, int], set[float]] = {}
    for i in range(6):
        for j in range(6):
            offset = i // 3 - j // 3, i % 3 - j % 3
            offsets.setdefault(offset, set()).add(float(patches[i, j]))
    assert all(len(values) == 1 for values in offsets.values())
    assert len({v for values in offsets.values() for v in values}) == len(offsets) == 15


def small(**changes: object) -> TransformerConfig:
    settings = {"dim": 8, "depth": 2, "heads": 2, "dropout": 0.0, "attention_dropout": 0.0}
    return TransformerConfig(**(settings | changes))  # type: ignore[arg-type]


def test_a_pre_norm_block_without_ffn_is_identity_and_attention() -> None:
    torch.manual_seed(0)
    block = Block(small(norm="pre"), 0.0).eval()
    nn.init.zeros_(block.ffn.fc2.weight)
    nn.init.zeros_(block.ffn.fc2.bias)
    x = torch.randn(2, 5, 8)
    y, ffn = block(x, None)
    assert (ffn == 0).all()
    torch.testing.assert_close(y, x + block.attention(block.norm1(x), None))


def test_layer_scale_and_drop_path() -> None:
    torch.manual_seed(0)
    x = torch.randn(400, 3, 8)
    plain, scaled = Block(small(norm="pre"), 0.0), Block(small(norm="pre", layer_scale=0.1), 0.0)
    scaled.load_state_dict(plain.state_dict(), strict=False)
    for block in (plain, scaled):
        nn.init.zeros_(block.ffn.fc2.weight)
        nn.init.zeros_(block.ffn.fc2.bias)
    torch.testing.assert_close(scaled(x, None)[0] - x, 0.1 * (plain(x, None)[0] - x))
    dropping = Block(small(norm="pre"), 0.25).train()
    dropping.load_state_dict(plain.state_dict())
    moved = dropping(x, None)[0] - x
    expected = plain(x, None)[0] - x
    kept = moved.flatten(1).any(1)  # whole rows
    assert 0.65 < float(kept.float().mean()) < 0.85
    torch.testing.assert_close(moved[kept], expected[kept] / 0.75)
    assert torch.equal(dropping.eval()(x, None)[0] - x, expected)
    trunk = Trunk(small(norm="pre", drop_path=0.3, depth=4), 4, layer_drop=0.0)
    rates = [block.branch1.drop_path for block in trunk.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3])


def test_keys_without_a_bias_equal_keys_with_a_bias_of_zero() -> None:
    torch.manual_seed(0)
    config = small(qkv_bias="qv")
    block = Block(config, 0.0)
    assert block.attention.qkv.bias is None
    whole = Block(small(), 0.0)
    with torch.no_grad():
        nn.init.normal_(block.attention.q_bias), nn.init.normal_(block.attention.v_bias)  # type: ignore[arg-type]
        state = {
            k: v for k, v in block.state_dict().items() if not k.endswith(("q_bias", "v_bias"))
        }
        q, v = block.attention.q_bias, block.attention.v_bias
        state["attention.qkv.bias"] = torch.cat([q, torch.zeros(8), v])  # type: ignore[list-item]
        whole.load_state_dict(state)
    x = torch.randn(2, 5, 8)
    torch.testing.assert_close(block(x, None)[0], whole(x, None)[0])


def test_a_dropped_layer_changes_nothing_and_gets_a_zero_gradient() -> None:
    torch.manual_seed(0)
    trunk = Trunk(small(), 2, layer_drop=0.999)
    x = torch.randn(1, 4, 8, requires_grad=True)
    y, _ = trunk.train()(x, None)
    assert torch.equal(y, x)
    y.sum().backward()
    gradients = [p.grad for p in trunk.parameters()]
    assert all(g is not None and not g.any() for g in gradients)
    y, _ = trunk.eval()(x, None)
    assert not torch.equal(y, x)
