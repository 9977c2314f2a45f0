"""The interface between the algorithm and the training engine: a protocol with two implementations.

local.py is plain torch in one process, the reference that the other is tested against. zero.py is
DeepSpeed ZeRO 0 to 3 on any number of ranks. The EMA, checkpoints and resume use only `partitions`,
`refresh` and `publish`, so they do not depend on the ZeRO stage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from d2v_ds.batch import Batch
from d2v_ds.config import EngineSettings, Optim
from d2v_ds.config.decoding import merge
from d2v_ds.config.engine_file import load_engine_config
from d2v_ds.errors import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Pieces = Mapping[str, tuple[int, Tensor]]
"""The elements of some parameters that a rank owns: {name: (offset in the flattened parameter, flat
fp32 values)}."""

EmaKind = Literal["ema", "ema_compensation"]


@dataclass(frozen=True)
class ParamGroup:
    """Parameters that take optimizer steps together."""

    name: str
    part: str  # "" if every step trains it; else the modality that it belongs to
    averaged: bool  # whether the teacher follows it
    decay: bool  # whether weight decay applies
    parameters: Mapping[str, nn.Parameter]  # by full name in the wrapped module, in module order
    lr_scale: float = 1.0  # factor of the learning rate


@dataclass(frozen=True)
class Partition:
    """The elements of one parameter that this rank owns: live, flat fp32 views of equal length."""

    offset: int  # of the first element in the flattened parameter
    master: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    adam_step: Tensor  # a scalar; parameters of one group may share it


class Engine(Protocol):
    device: torch.device
    precision: str  # fp32, bf16 or fp16
    replicated: bool  # every rank owns everything (local, stage 0), so only rank 0 need write it
    groups: Sequence[ParamGroup]

    def __call__(self, batch: Batch, count: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The forward pass of the wrapped task for a batch on `device`: (loss, sums). The loss is
        this micro-batch's share of the step's loss, whose normaliser `count` is global."""

    def evaluate(self, batch: Batch, count: int) -> tuple[Tensor, dict[str, Tensor]]:
        """As `__call__`, in evaluation mode and without gradients. Collective at stage 3: all ranks
        must call it."""

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of one micro-batch; they are summed over micro-batches and ranks.
        Called `accumulation` times before each step."""

    def step(self, lr: float, weight_decay: float, active: str) -> bool:
        """Takes one optimizer step; True if parameters changed.

        Groups whose part is neither "" nor `active` keep their weights, moments and Adam steps;
        they must not have received gradients. A non-finite gradient norm on any rank skips the
        step on all of them.
        """

    def grad_norm(self) -> Tensor:
        """The global norm of the last step's gradients before clipping, fp32, on the device; not
        finite if that step was skipped."""

    def partitions(self) -> dict[str, Partition]:
        """The partitions of this rank by parameter name; parameters without elements on this rank
        are missing. The views stay the same for the engine's lifetime."""

    def refresh(self) -> None:
        """Updates the low-precision weights after masters were written. Collective: all ranks must
        call it."""

    def publish(self, module: nn.Module, values: Pieces) -> None:
        """Writes values into the frozen `module`, a submodule of the wrapped one, cast to its
        dtype; names are relative to `module`, and every rank passes what it owns.

        Stage 0 copies locally, stages 1 and 2 all-gather, stage 3 copies from partition to
        partition. Collective: all ranks must call it, each time with the same names, offsets and
        lengths, which are those of trainable parameters in averaged groups.
        """


def create_engine(
    module: nn.Module,
    groups: Sequence[ParamGroup],
    *,
    settings: EngineSettings,
    optim: Optim,
    accumulation: int,
    device: torch.device,
    overrides: Mapping[str, Any] | None = None,
) -> Engine:
    """The engine that `settings.config` names, around `module`, whose parameters are fp32.

    accumulation: this rank's micro-batches in one optimizer step. overrides: DeepSpeed settings
    that replace those of the JSON file (tests use small buckets). Every engine except the local one
    needs torch.distributed. Raises UserError for settings that cannot run here.
    """
    precision = resolve_precision(settings.precision, device)
    trainable = {name for name, p in module.named_parameters() if p.requires_grad}
    grouped = [name for group in groups for name in group.parameters]
    assert len(grouped) == len(set(grouped)) and set(grouped) == trainable, (
        "the groups must hold every trainable parameter exactly once"
    )
    assert all(p.dtype == torch.float32 for p in module.parameters()), "parameters must be fp32"
    if settings.config == "local":
        from d2v_ds.engine.local import LocalEngine

        return LocalEngine(module, groups, precision=precision, optim=optim, device=device)
    from d2v_ds.engine.zero import ZeroEngine

    return ZeroEngine(
        module,
        groups,
        ds_config=merge(load_engine_config(settings.config), overrides or {}),
        precision=precision,
        optim=optim,
        accumulation=accumulation,
        device=device,
    )


def resolve_precision(precision: str, device: torch.device) -> str:
    """fp32, bf16 or fp16; "auto" is bf16 on a GPU and fp32 on a CPU. Raises UserError."""
    if precision == "auto":
        return "fp32" if device.type == "cpu" else "bf16"
    if precision == "fp16" and device.type == "cpu":
        raise UserError("engine.precision: fp16 needs a GPU; use bf16 or fp32 on a CPU")
    return precision
