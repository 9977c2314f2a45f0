"""The optimizer: parameter groups, the AdamW update and its state."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from d2v_ds.config import Optim
from d2v_ds.engine import ParamGroup
from d2v_ds.engine.optimizer import AdamW
from tests.helpers.toy import build


def group(name: str, decay: bool, *parameters: nn.Parameter) -> ParamGroup:
    named = {f"{name}{i}": p for i, p in enumerate(parameters)}
    return ParamGroup(name, name, averaged=False, decay=decay, parameters=named)


def adamw(groups: list[ParamGroup], optim: Optim) -> AdamW:
    optimizer = AdamW(groups, optim)
    optimizer.create_state(p for g in groups for p in g.parameters.values())
    return optimizer


def test_groups_by_part_averaging_and_decay_keep_module_order() -> None:
    toy, groups = build()
    names = [name for name, p in toy.named_parameters() if p.requires_grad]
    assert sorted(n for g in groups for n in g.parameters) == sorted(names)
    for g in groups:
        assert list(g.parameters) == [n for n in names if n in g.parameters]
        assert all(p is dict(toy.named_parameters())[n] for n, p in g.parameters.items())
    by_name = {g.name: g for g in groups}
    assert sorted(by_name) == sorted(
        ["a", "a/decay", "b", "b/decay", "all/averaged", "all/averaged/decay"]
    )
    assert list(by_name["all/averaged/decay"].parameters) == [
        "trunk.conv.weight",
        "trunk.ffn.0.weight",
        "trunk.ffn.3.weight",
    ]
    assert "trunk.layer_scale" in by_name["all/averaged"].parameters  # 2-D, but a scale
    assert list(by_name["b"].parameters) == ["head.b.bias"]
    assert by_name["b"].part == "b" and not by_name["b"].averaged and not by_name["b"].decay


def test_decay_all_decays_every_parameter() -> None:
    _, groups = build(decay_all=True)
    assert sorted(g.name for g in groups) == ["a/decay", "all/averaged/decay", "b/decay"]


def written_out(
    p: Tensor, gradients: list[Tensor], lrs: list[float], decay: float, optim: Optim
) -> Tensor:
    """The update as defined by the papers, torch and fairseq, in float64."""
    p = p.double()
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    b1, b2 = optim.betas
    for t, (g, lr) in enumerate(zip(gradients, lrs, strict=True), 1):
        m = b1 * m + (1 - b1) * g.double()
        v = b2 * v + (1 - b2) * g.double() ** 2
        p = p - lr * decay * p
        if optim.adam_eps == "fairseq":
            p = p - lr * math.sqrt(1 - b2**t) / (1 - b1**t) * m / (v.sqrt() + optim.eps)
        else:
            p = p - lr * (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + optim.eps)
    return p


@pytest.mark.parametrize("eps_form", ["torch", "fairseq"])
def test_the_update_matches_the_formula(eps_form: str) -> None:
    optim = Optim(eps=1e-2, adam_eps=eps_form)  # type: ignore[arg-type]
    g = torch.Generator().manual_seed(0)
    start = [torch.randn(7, 3, generator=g), torch.randn(5, generator=g)]
    parameters = [nn.Parameter(p.clone()) for p in start]
    optimizer = adamw([group("x", True, parameters[0]), group("y", False, parameters[1])], optim)
    gradients = [[torch.randn(p.shape, generator=g) * 0.1 for p in start] for _ in range(6)]
    lrs = [0.1, 0.2, 0.0, 0.3, 0.1, 0.05]
    for grads, lr in zip(gradients, lrs, strict=True):
        for p, grad in zip(parameters, grads, strict=True):
            p.grad = grad.clone()
        optimizer.prepare(lr, 0.5, ("x", "y"))
        optimizer.step()
    for i, decay in ((0, 0.5), (1, 0.0)):
        want = written_out(start[i], [grads[i] for grads in gradients], lrs, decay, optim)
        torch.testing.assert_close(parameters[i].double(), want, rtol=1e-6, atol=1e-6)
        other = Optim(eps=1e-2, adam_eps="fairseq" if eps_form == "torch" else "torch")
        wrong = written_out(start[i], [grads[i] for grads in gradients], lrs, decay, other)
        assert (parameters[i].double() - wrong).abs().max() > 1e-3  # the two forms differ


def test_idle_groups_do_not_change_and_groups_count_their_own_steps() -> None:
    optim = Optim(adam_eps="fairseq")
    a, b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = adamw([group("a", True, a), group("b", True, b)], optim)

    def step(part: str) -> None:
        for p in (a, b):
            p.grad = torch.tensor([0.1, -0.2, 0.3])
        optimizer.prepare(0.1, 0.1, ("", part))
        optimizer.step()

    step("a")
    step("a")
    assert torch.equal(b, torch.ones(3)) and not optimizer.state[b]["exp_avg"].any()
    first = a.detach().clone()
    step("b")
    step("b")
    assert torch.equal(a, first) and optimizer.state[a]["step"] == 2
    assert torch.equal(b, first), "the bias correction of b must count only steps of b"


def test_no_group_is_active_before_the_first_prepare() -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = AdamW([group("a", True, p)], Optim())
    p.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(p, torch.ones(3)) and not optimizer.state[p]


def test_a_state_of_zeros_acts_like_no_state() -> None:
    plain = nn.Parameter(torch.ones(9))
    ours = nn.Parameter(torch.ones(9))
    optim = Optim(betas=(0.9, 0.98), eps=1e-6)
    reference = torch.optim.AdamW(
        [plain], lr=0.1, betas=optim.betas, eps=optim.eps, weight_decay=0.1, fused=True
    )
    optimizer = adamw([group("a", True, ours)], optim)
    for i in range(3):
        plain.grad, ours.grad = torch.full((9,), i - 0.5), torch.full((9,), i - 0.5)
        optimizer.prepare(0.1, 0.1, ("a",))
        optimizer.step()
        reference.step()
    assert torch.equal(plain, ours)


def test_state_is_created_once() -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = adamw([group("a", True, p)], Optim())
    with pytest.raises(AssertionError, match="already has a state"):
        optimizer.create_state([p])
