"""The layers on top of a fine-tuned encoder."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from d2v_ds.finetune.heads import CtcHead, FirstHead, MeanHead, last_layer, mean

B, T, D, C = 3, 7, 64, 5


def tokens() -> torch.Tensor:
    return torch.randn(B, T, D, generator=torch.Generator().manual_seed(0))


def valid() -> torch.Tensor:
    return torch.arange(T) < torch.tensor([7, 1, 4])[:, None]


def test_shapes_and_names() -> None:
    for kind, shape, names in (
        (CtcHead, (B, T, C), {"proj.weight", "proj.bias"}),
        (MeanHead, (B, C), {"norm.weight", "norm.bias", "proj.weight", "proj.bias"}),
        (FirstHead, (B, C), {"dense.weight", "dense.bias", "proj.weight", "proj.bias"}),
    ):
        head = kind(D, C, std=None, dropout=0.0)
        assert head(tokens(), None).shape == head(tokens(), valid()).shape == shape
        assert set(head.state_dict()) == names


def test_the_mean_ignores_padding() -> None:
    x, exists = tokens(), valid()
    expected = torch.stack([row[keep].mean(0) for row, keep in zip(x, exists, strict=True)])
    torch.testing.assert_close(mean(x, exists), expected)
    torch.testing.assert_close(mean(x, None), x.mean(1))
    head = MeanHead(D, C, std=0.02, dropout=0.0)
    other = torch.where(exists[:, :, None], x, torch.full_like(x, 1e4))
    torch.testing.assert_close(head(x, exists), head(other, exists))
    normed = F.layer_norm(expected, (D,), eps=1e-6)
    torch.testing.assert_close(head(x, exists), F.linear(normed, head.proj.weight))


def test_the_first_token_alone_is_read() -> None:
    head = FirstHead(D, C, std=0.02, dropout=0.0)
    x = tokens()
    expected = head.proj(torch.tanh(F.linear(x[:, 0], head.dense.weight, head.dense.bias)))
    torch.testing.assert_close(head(x, None), expected)
    x[:, 1:] = 0
    torch.testing.assert_close(head(x, valid()), expected)


def test_ctc_reads_every_token() -> None:
    head = CtcHead(D, C, std=None, dropout=0.0)
    x = tokens()
    torch.testing.assert_close(head(x, None)[1, 3], head.proj(x[1, 3]))


@pytest.mark.parametrize("std", [0.02, 2e-5])
def test_initial_weights_are_a_truncated_normal(std: float) -> None:
    torch.manual_seed(0)
    layer = last_layer(500, 400, std)
    weight = layer.weight.detach()
    assert float(weight.abs().max()) <= 2 * std * (1 + 1e-6)
    # a normal distribution cut at two standard deviations has 0.8796 of the spread
    assert float(weight.std()) == pytest.approx(0.8796 * std, rel=0.02)
    assert float(weight.mean()) == pytest.approx(0, abs=0.01 * std)
    assert not layer.bias.any()


def test_without_a_standard_deviation_ctc_has_xavier_weights() -> None:
    torch.manual_seed(0)
    bound = (6 / (D + C)) ** 0.5
    weight = CtcHead(D, C, std=None, dropout=0.0).proj.weight.detach()
    assert 0.9 * bound < float(weight.abs().max()) <= bound
    for kind in (MeanHead, FirstHead):
        assert bool((kind(D, C, std=None, dropout=0.0).proj.weight.abs() <= 0.04).all())


def test_dropout_is_active_in_training_only() -> None:
    for kind in (CtcHead, MeanHead, FirstHead):
        head = kind(D, C, std=0.5, dropout=0.5)
        x = tokens()
        assert not torch.equal(head(x, None), head(x, None))
        head.eval()
        assert torch.equal(head(x, None), head(x, None))
