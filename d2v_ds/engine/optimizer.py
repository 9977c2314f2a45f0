"""The optimizer of both engines: parameters in groups, and an AdamW that steps some of them.

    named parameters --param_groups--> groups --AdamW.prepare(lr, weight decay, parts), step()-->

DeepSpeed replaces the parameters of each group by its own flat fp32 masters and then calls step()
group by group, so everything that a step needs is stored in the groups.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from d2v_ds.config import Optim
from d2v_ds.engine import ParamGroup


def param_groups(
    module: nn.Module,
    part_of: Callable[[str], str],
    averaged: Callable[[str], bool],
    *,
    decay_all: bool,
    lr_scale: Callable[[str], float] = lambda name: 1.0,
) -> list[ParamGroup]:
    """The trainable parameters of `module`, grouped by (part, averaged, decay, factor of the
    learning rate), in module order.

    Parameters of fewer than 2 dimensions, biases and scales are exempt from weight decay, unless
    `decay_all`. Parameters that the teacher averages have groups of their own, so that its copy can
    have the same layout as the optimizer's flat buffers.
    """
    grouped: dict[tuple[str, bool, bool, float], dict[str, nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            spared = parameter.dim() < 2 or name.endswith(("bias", "_scale"))
            key = part_of(name), averaged(name), decay_all or not spared, lr_scale(name)
            grouped.setdefault(key, {})[name] = parameter
    return [
        ParamGroup(
            name="/".join(
                [
                    part or "all",
                    *["averaged"] * mean,
                    *["decay"] * decay,
                    *[f"lr x {scale:.3g}"] * (scale != 1.0),
                ]
            ),
            part=part,
            averaged=mean,
            decay=decay,
            lr_scale=scale,
            parameters=parameters,
        )
        for (part, mean, decay, scale), parameters in grouped.items()
    ]


class AdamW(torch.optim.AdamW):
    """AdamW (Loshchilov and Hutter 2019) in which only the groups of active parts take a step.

    The other groups are hidden from `step`, because a zero gradient is not the same as no step:
    moments would decay and weight decay would apply. Each group counts its own Adam steps for the
    bias correction. No group is active before the first `prepare`, so that the step which DeepSpeed
    takes during its initialisation (stage 0 in bf16) changes nothing.

    adam_eps "fairseq" adds eps before the bias correction of the second moment, as fairseq's Adam
    does (fairseq/optim/adam.py): m / (sqrt(v) + eps) * sqrt(1 - b2^t) equals what torch computes
    with eps / sqrt(1 - b2^t) at step t.
    """

    def __init__(self, groups: Sequence[ParamGroup], optim: Optim) -> None:
        self._eps, self._fairseq = optim.eps, optim.adam_eps == "fairseq"
        on_gpu = any(p.is_cuda for group in groups for p in group.parameters.values())
        super().__init__(
            [
                {
                    "params": list(group.parameters.values()),
                    "part": group.part,
                    "decay": group.decay,
                    "lr_scale": group.lr_scale,
                    "active": False,
                }
                for group in groups
            ],
            lr=0.0,
            betas=optim.betas,
            eps=optim.eps,
            weight_decay=0.0,
            # One pass over memory. On a CPU the last digits of the fused kernel depend on an
            # element's index in the tensor, and therefore on ranks and stage. Plain operations do
            # not have this dependence.
            fused=on_gpu,
            foreach=False,
        )

    def create_state(self, parameters: Iterable[Tensor]) -> None:
        """Creates zero moments and Adam steps for `parameters`. This is equivalent to no state, but
        readable and writable before the first step."""
        for p in parameters:
            assert not self.state[p], "the optimizer already has a state"
            self.state[p].update(
                step=torch.zeros((), dtype=torch.float32, device=p.device),
                exp_avg=torch.zeros_like(p),
                exp_avg_sq=torch.zeros_like(p),
            )

    def prepare(self, lr: float, weight_decay: float, parts: Iterable[str]) -> None:
        """Sets the next step's learning rate and weight decay, and the parts that take it."""
        for group in self.param_groups:
            group["lr"] = lr * group["lr_scale"]
            group["weight_decay"] = weight_decay if group["decay"] else 0.0
            group["active"] = group["part"] in parts

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step of the active groups, as `prepare` set them."""
        assert closure is None, "closures are not supported"
        groups = self.param_groups
        self.param_groups = [group for group in groups if group["active"] and group["params"]]
        if self._fairseq:
            for group in self.param_groups:
                t = float(self.state[group["params"][0]]["step"]) + 1.0
                group["eps"] = self._eps / math.sqrt(1.0 - group["betas"][1] ** t)
        try:
            super().step()
        finally:
            self.param_groups = groups
