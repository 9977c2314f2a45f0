"""The reference engine: plain torch in one process, in fp32, or in bf16 with fp32 masters.

The operations that ZeRO performs with buffers and collectives are explicit here: gradients are
summed in fp32, checked and clipped, AdamW updates the masters, and the low-precision weights are a
copy of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from d2v_ds.batch import Batch
from d2v_ds.config import Optim
from d2v_ds.engine import ParamGroup, Partition, Pieces
from d2v_ds.engine.optimizer import AdamW
from d2v_ds.errors import UserError


class LocalEngine:
    """One process that owns the whole state. Implements `Engine`, which documents the methods."""

    replicated = True

    def __init__(
        self,
        module: nn.Module,
        groups: Sequence[ParamGroup],
        *,
        precision: str,
        optim: Optim,
        device: torch.device,
    ) -> None:
        if precision == "fp16":
            raise UserError("engine.precision: fp16 needs engine.config=zero1, zero2 or zero3")
        self.device, self.precision, self.groups = device, precision, groups
        self._module = module.to(device)
        self._clip = optim.clip
        self._weights = {n: p for group in groups for n, p in group.parameters.items()}
        self._masters = self._weights  # in fp32 the weights are the masters
        if precision == "bf16":
            self._masters = {n: nn.Parameter(p.detach().clone()) for n, p in self._weights.items()}
            for parameter in module.parameters():
                parameter.data = parameter.data.bfloat16()
        self._adamw = AdamW(
            [
                dataclasses.replace(g, parameters={n: self._masters[n] for n in g.parameters})
                for g in groups
            ],
            optim,
        )
        self._adamw.create_state(self._masters.values())
        self._grad_norm = torch.zeros((), device=device)

    def __call__(self, batch: Batch, count: int) -> tuple[Tensor, dict[str, Tensor]]:
        result: tuple[Tensor, dict[str, Tensor]] = self._module(batch, count)
        return result

    @torch.no_grad()
    def evaluate(self, batch: Batch, count: int) -> tuple[Tensor, dict[str, Tensor]]:
        self._module.eval()
        try:
            return self(batch, count)
        finally:
            self._module.train()

    def backward(self, loss: Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]
        if self._masters is self._weights:
            return
        for name, weight in self._weights.items():
            if weight.grad is not None:
                grad, master = weight.grad.float(), self._masters[name]
                master.grad = grad if master.grad is None else master.grad.add_(grad)
                weight.grad = None

    @torch.no_grad()
    def step(self, lr: float, weight_decay: float, active: str) -> bool:
        parts = ("", active)
        stepping = [self._masters[n] for g in self.groups if g.part in parts for n in g.parameters]
        gradients = []
        for master in stepping:
            if master.grad is None:  # unused, but moments and weight decay still apply, as in ZeRO
                master.grad = torch.zeros_like(master)
            gradients.append(master.grad)
        self._grad_norm = get_total_norm(gradients)
        finite = bool(self._grad_norm.isfinite())
        if finite:
            if self._clip > 0:
                clip_grads_with_norm_(stepping, self._clip, self._grad_norm)
            self._adamw.prepare(lr, weight_decay, parts)
            self._adamw.step()
            self.refresh()
        self._adamw.zero_grad(set_to_none=True)
        return finite

    def grad_norm(self) -> Tensor:
        return self._grad_norm

    def partitions(self) -> dict[str, Partition]:
        partitions = {}
        for name, master in self._masters.items():
            state = self._adamw.state[master]
            partitions[name] = Partition(
                offset=0,
                master=master.detach().view(-1),
                exp_avg=state["exp_avg"].view(-1),
                exp_avg_sq=state["exp_avg_sq"].view(-1),
                adam_step=state["step"],
            )
        return partitions

    @torch.no_grad()
    def refresh(self) -> None:
        if self._masters is not self._weights:
            torch._foreach_copy_(list(self._weights.values()), list(self._masters.values()))

    @torch.no_grad()
    def publish(self, module: nn.Module, values: Pieces) -> None:
        publish_whole(module, values)


@torch.no_grad()
def publish_whole(module: nn.Module, values: Pieces) -> None:
    """`publish` without communication, if every rank has all values."""
    weights = [module.get_parameter(name).view(-1) for name in values]
    for (name, (offset, value)), weight in zip(values.items(), weights, strict=True):
        assert offset == 0 and len(value) == len(weight), f"only a part of {name} is given"
    torch._foreach_copy_(weights, [value for _, value in values.values()])
