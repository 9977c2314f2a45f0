"""The cluster engine: DeepSpeed ZeRO stages 0 to 3. The only file that uses DeepSpeed.

The run configuration and a file of ds_configs/ define one DeepSpeed engine around the task. At
start-up, the location of every parameter in DeepSpeed's flat fp32 masters is determined and
verified once. After that, `partitions`, `refresh` and `publish` are copies between tensors. Most of
the stage-dependent code is in `find_masters` and below.

R ranks, P parameters.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from d2v_ds.batch import Batch
from d2v_ds.config import Optim
from d2v_ds.config.decoding import merge
from d2v_ds.engine import DTYPES, ParamGroup, Partition, Pieces
from d2v_ds.engine.layout import FlatCopy, check_layout, gather_layout, signature
from d2v_ds.engine.local import publish_whole
from d2v_ds.engine.optimizer import AdamW
from d2v_ds.errors import UserError

# DeepSpeed settings that hide the fp32 masters or change the result: path -> (refused values,
# reason)
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "zero_optimization.round_robin_gradients": (
        (True,),
        "it led to different weights in tests; remove it",
    ),
    "zero_optimization.compute_grad_norm": (
        (False,),
        "without the norm, non-finite steps would not be skipped; remove it",
    ),
    "zero_optimization.offload_optimizer.device": (
        ("nvme",),
        "the teacher and checkpoints read the fp32 masters in memory; use cpu",
    ),
    "zero_optimization.offload_param.device": (
        ("nvme",),
        "the teacher's forward copy is written in memory; use cpu",
    ),
    "bf16.bf16_master_weights_and_grads": (
        (True,),
        "the teacher is the average of fp32 masters; remove it",
    ),
    "fp16.fp16_master_weights_and_grads": (
        (True,),
        "the teacher is the average of fp32 masters; remove it",
    ),
}


GPU_ONLY = (
    "zero_optimization.zero_quantized_weights",
    "zero_optimization.zero_quantized_gradients",
)


class ZeroEngine:
    """Implements `Engine`, which documents the methods, on all ranks of torch.distributed."""

    def __init__(
        self,
        module: nn.Module,
        groups: Sequence[ParamGroup],
        *,
        ds_config: Mapping[str, Any],
        precision: str,
        optim: Optim,
        accumulation: int,
        device: torch.device,
    ) -> None:
        self.stage = check_settings(ds_config, precision, device)
        self.device, self.precision, self.groups = device, precision, groups
        self.replicated = self.stage == 0
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self._accumulation, self._micro_batches = accumulation, 0
        self._grad_norm = torch.zeros((), device=device)
        self._copies: dict[nn.Module, FlatCopy] = {}

        module.to(device)
        for parameter in module.parameters():  # before the fp32 values are kept
            dist.broadcast(parameter.data, 0)
        self._weights: dict[str, Any] = {n: p for g in groups for n, p in g.parameters.items()}
        initial = {n: p.detach().to("cpu", copy=True).view(-1) for n, p in self._weights.items()}
        self._adamw = AdamW(groups, optim)
        self._engine = create_deepspeed(
            module,
            self._adamw,
            merge(ds_config, run_settings(precision, optim, accumulation)),
            device,
        )
        flats, masters = find_masters(self.stage, self._engine, self._weights, self.rank)
        self._adamw.create_state(flats)
        self._partitions = {name: self._partition(master) for name, master in masters.items()}
        extents = {n: (at.offset, at.length, at.start) for n, at in masters.items()}
        self._layout = gather_layout(self._weights, extents, device)
        check_layout(self._layout, {n: len(v) for n, v in initial.items()}, self.replicated)
        self._start_from(initial)

    def _partition(self, at: _Master) -> Partition:
        state = self._adamw.state[at.flat]
        return Partition(
            offset=at.offset,
            master=at.view(at.flat),
            exp_avg=at.view(state["exp_avg"]),
            exp_avg_sq=at.view(state["exp_avg_sq"]),
            adam_step=state["step"],
        )

    def _start_from(self, initial: Mapping[str, Tensor]) -> None:
        """Sets the masters to the fp32 weights. DeepSpeed initialises them from weights that are
        already rounded to low precision, and comparing the two shows that every partition was
        found."""
        for name, partition in self._partitions.items():
            value = initial[name][partition.offset : partition.offset + len(partition.master)]
            rounded = value.to(DTYPES[self.precision]).float()
            assert partition.master.dtype == torch.float32, f"the master of {name} is not fp32"
            assert torch.equal(partition.master.cpu(), rounded), f"{name}: its master is elsewhere"
            partition.master.copy_(value)
        self.refresh()

    def __call__(self, batch: Batch, count: int) -> tuple[Tensor, dict[str, Tensor]]:
        result: tuple[Tensor, dict[str, Tensor]] = self._engine(batch, count)
        return result

    @torch.no_grad()
    def evaluate(self, batch: Batch, count: int) -> tuple[Tensor, dict[str, Tensor]]:
        self._engine.eval()
        try:
            return self(batch, count)
        finally:
            self._engine.train()

    def backward(self, loss: Tensor) -> None:
        if self._micro_batches:
            self._engine.step()  # between micro-batches this only counts
        # DeepSpeed averages over ranks, but the loss is to be summed.
        self._engine.backward(loss * self.ranks, scale_wrt_gas=False)
        self._micro_batches += 1

    @torch.no_grad()
    def step(self, lr: float, weight_decay: float, active: str) -> bool:
        assert self._micro_batches == self._accumulation, (
            f"{self._micro_batches} micro-batches before a step of {self._accumulation}"
        )
        self._micro_batches = 0
        finite = True
        if self.stage == 0 and self.precision == "fp32":  # DeepSpeed has no norm and skips nothing
            gradients = [p.grad for p in self._weights.values() if p.grad is not None]
            self._grad_norm = get_total_norm(gradients)
            finite = bool(self._grad_norm.isfinite())
        if self.stage == 3:
            self._zero_idle_gradients(active)
        self._adamw.prepare(lr, weight_decay, ("", active) if finite else ())
        self._engine.step()
        if self.stage > 0 or self.precision != "fp32":
            norm = self._engine.get_global_grad_norm()
            self._grad_norm = torch.as_tensor(norm, dtype=torch.float32, device=self.device)
        return finite and bool(self._engine.was_step_applied())

    def _zero_idle_gradients(self, active: str) -> None:
        """At stage 3 an unused parameter keeps the gradient of its last step, which would enter the
        norm and thus the clipping."""
        from deepspeed.utils import safe_set_local_grad

        for group in self.groups:
            if group.part not in ("", active):
                for name in group.parameters:
                    parameter = self._weights[name]
                    safe_set_local_grad(parameter, torch.zeros_like(parameter.ds_tensor))

    def grad_norm(self) -> Tensor:
        return self._grad_norm

    def partitions(self) -> dict[str, Partition]:
        return dict(self._partitions)

    @torch.no_grad()
    def refresh(self) -> None:
        optimizer = self._engine.optimizer
        if self.stage == 3:
            for name, partition in self._partitions.items():
                piece = self._weights[name].ds_tensor.view(-1)
                piece[: len(partition.master)].copy_(partition.master)
            gather_again(list(self._weights.values()))
        elif self.stage > 0:
            optimizer.update_lp_params()
        elif self.precision != "fp32":
            for weights, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
                torch._foreach_copy_(weights, masters)

    @torch.no_grad()
    def publish(self, module: nn.Module, values: Pieces) -> None:
        assert not any(p.requires_grad for p in module.parameters()), "the module is not frozen"
        if self.stage == 0:
            publish_whole(module, values)
        elif self.stage == 3:
            publish_partitioned(module, values, self.rank)
        else:
            if module not in self._copies:
                self._copies[module] = self._lay_out(module, values)
            self._copies[module].publish(values)

    def _lay_out(self, module: nn.Module, values: Pieces) -> FlatCopy:
        """A flat copy in which each parameter of the frozen module takes the slot of an
        averaged parameter with the same extents on all ranks, regardless of its name."""
        free: dict[tuple[int, ...], deque[tuple[int, int]]] = defaultdict(deque)
        names = list(self._weights)
        sizes = [len(group["params"][0]) for group in self._adamw.param_groups]  # per rank
        for index, group in enumerate(self.groups):
            for name in group.parameters if group.averaged else ():
                pieces = self._layout[:, names.index(name)]  # [R, 3]
                first = int(((pieces[:, 0] == 0) & (pieces[:, 1] > 0)).nonzero()[0, 0])
                start = first * sizes[index] + int(pieces[first, 2])
                free[signature(pieces)].append((index, start))

        copy = FlatCopy(self.rank)
        frozen = dict(module.named_parameters())
        given = {n: (offset, len(value), 0) for n, (offset, value) in values.items()}
        layout = gather_layout(frozen, given, self.device)
        for i, (name, parameter) in enumerate(frozen.items()):
            if not layout[:, i, 1].any():
                continue  # not published
            places = free[signature(layout[:, i])]
            assert places, f"{name} is not partitioned like any averaged parameter"
            index, start = places.popleft()
            copy.place(name, parameter, index, self.ranks * sizes[index], start, given.get(name))
        return copy


# ------------------------------------------------------------------------------------- starting


def check_settings(ds_config: Mapping[str, Any], precision: str, device: torch.device) -> int:
    """The ZeRO stage. Raises UserError for settings that this engine does not support."""
    stage = lookup(ds_config, "zero_optimization.stage")
    if stage not in (0, 1, 2, 3):
        raise UserError(
            f"engine.config: zero_optimization.stage must be 0, 1, 2 or 3, got {stage!r}"
        )
    for path, (values, reason) in REFUSED.items():
        if (value := lookup(ds_config, path)) in values:
            raise UserError(f"engine.config: {path}={value!r} is refused: {reason}")
    for path in GPU_ONLY:
        if lookup(ds_config, path) and device.type == "cpu":
            raise UserError(f"engine.config: {path} needs a GPU; remove it, or use zero3 on a CPU")
    if precision == "fp16" and stage == 0:
        raise UserError(
            "engine.precision: DeepSpeed does not scale the loss of fp16 at ZeRO stage 0; "
            "use engine.config=zero1 or engine.precision=bf16"
        )
    return int(stage)


def lookup(config: Mapping[str, Any], path: str) -> Any:
    """The value at a dotted path; None if there is none."""
    value: Any = config
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def run_settings(precision: str, optim: Optim, accumulation: int) -> dict[str, Any]:
    """The DeepSpeed settings that the run configuration owns. The micro-batch size is nominal,
    because DeepSpeed does not process samples or tokens."""
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": optim.clip,
        "zero_allow_untested_optimizer": True,  # required for any subclass of AdamW
        "zero_force_ds_cpu_optimizer": False,  # DeepSpeed's would be compiled at run time
        "steps_per_print": None,
    }
    if precision != "fp32":
        settings[precision] = {"enabled": True}
    return settings


def create_deepspeed(
    module: nn.Module, optimizer: AdamW, config: dict[str, Any], device: torch.device
) -> Any:
    """DeepSpeed's engine, without its log and its compiled operators. Raises UserError for settings
    that DeepSpeed rejects."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed needs it even in a single process
    import deepspeed
    from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError

    # On a CPU this operator would be compiled at the start, guarded by a lock file that a killed
    # process leaves behind; gloo does the same work.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel(logging.ERROR)  # it warns about our AdamW
    warnings.filterwarnings("ignore", "`torch.distributed.", FutureWarning)  # of its old names
    deepspeed.init_distributed(dist_backend=dist.get_backend())
    try:
        DeepSpeedConfig(config)
    except (ValueError, DeepSpeedConfigError) as error:
        lines = [line.strip() for line in str(error).splitlines()]
        raise UserError(f"engine.config: rejected by DeepSpeed: {': '.join(lines[:3])}") from None
    engine = deepspeed.initialize(model=module, optimizer=optimizer, config=config)[0]
    deepspeed.utils.logger.setLevel(logging.WARNING)
    return engine


# ------------------------------------------------------------------------- where the masters are


@dataclass(frozen=True)
class _Master:
    """Elements [offset, offset + length) of a flattened parameter, in a flat fp32 master."""

    flat: Tensor
    start: int  # in `flat`
    offset: int
    length: int

    def view(self, like_flat: Tensor) -> Tensor:
        """The same elements of a tensor with the layout of `flat`."""
        return like_flat.detach().view(-1)[self.start : self.start + self.length]


def find_masters(
    stage: int, engine: Any, weights: Mapping[str, nn.Parameter], rank: int
) -> tuple[list[Tensor], dict[str, _Master]]:
    """Every flat fp32 master of this rank, and where the parameters are in them, by name.

    DeepSpeed keeps them in a different place at each stage; at stage 0 in fp32 they are the
    parameters.
    """
    optimizer = engine.optimizer
    found: dict[str, _Master] = {}
    if stage == 0:
        masters = {id(p): p for p in weights.values()}
        for low, high in zip(
            getattr(optimizer, "fp16_groups", ()),
            getattr(optimizer, "fp32_groups", ()),
            strict=True,
        ):
            masters.update((id(p), master) for p, master in zip(low, high, strict=True))
        for name, p in weights.items():
            found[name] = _Master(masters[id(p)], start=0, offset=0, length=p.numel())
        return [at.flat for at in found.values()], found
    if stage == 3:
        flats: list[Tensor] = optimizer.fp32_partitioned_groups_flat
        for name, p in weights.items():
            index, start, size = optimizer.grad_position[optimizer.get_param_id(p)]
            offset = rank * size
            length = min(size, p.ds_numel - offset)  # type: ignore[attr-defined]
            if length > 0:  # the last part is padded; later parts are only padding
                found[name] = _Master(flats[index], start, offset, length)
        return flats, found
    flats = [group["params"][0] for group in engine.basic_optimizer.param_groups]
    for name, p in weights.items():
        fragment = p._hp_mapping  # type: ignore[attr-defined]
        if fragment is not None:  # this rank owns a part of it
            high, low = fragment.hp_fragment_address, fragment.lp_fragment_address
            found[name] = _Master(
                flats[fragment.param_group_index], high.start, low.start, high.numel
            )
    return flats, found


# ----------------------------------------------------------------------------- stage 3


def publish_partitioned(module: nn.Module, values: Pieces, rank: int) -> None:
    """Stage 3: writes into this rank's partition of the frozen parameters, which has the layout of
    the trainable ones. Only the small parameters that stay gathered need communication."""
    pieces = []
    for name, (offset, value) in values.items():
        piece = module.get_parameter(name).ds_tensor.view(-1)  # type: ignore[attr-defined]
        assert offset == rank * len(piece) and len(value) <= len(piece), (
            f"{name}: the partition of the frozen parameter does not match the given values"
        )
        pieces.append(piece[: len(value)])
    if pieces:
        torch._foreach_copy_(pieces, [value for _, value in values.values()])
    gather_again(list(module.parameters()))


def gather_again(parameters: list[Any]) -> None:
    """Stage 3, after partitions were written: drops copies of the old values (whole parameters and
    those of hierarchical partitioning) and gathers the persistent parameters, which stay whole
    between steps, again."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    whole = [p for p in parameters if p.ds_status != ZeroParamStatus.NOT_AVAILABLE]
    if whole:
        whole[0].partition(whole)
    for p in parameters:
        p.ds_secondary_tensor = None
    persistent = [p for p in parameters if p.ds_persist]
    if persistent:
        persistent[0].all_gather(persistent)
