"""A task that trains in milliseconds and covers everything that an engine must get right: two
modalities with their own parts, a convolution, dropout, a frozen teacher in the forward pass,
parameters without weight decay, and batches of unequal size.

B samples, T tokens, D width, C input channels.
"""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from d2v_ds.config import Config, EngineSettings, Optim
from d2v_ds.engine import ParamGroup
from d2v_ds.engine.optimizer import param_groups
from d2v_ds.step import StepSettings, create_engine_and_ema, train_step
from d2v_ds.task import Task
from tests.helpers.steps import Losses, step_batch

CPU = torch.device("cpu")
C, D = 5, 24
BUCKETS = {  # small buckets, so that the parameters are split over several
    "zero_optimization": {
        "reduce_bucket_size": 500,
        "allgather_bucket_size": 500,
        "stage3_prefetch_bucket_size": 250,
        "stage3_param_persistence_threshold": 0,
    }
}


@dataclass(frozen=True)
class ToyBatch:
    modality: str
    index: int  # within all micro-batches of the step
    inputs: Tensor  # [B, T, C]
    scale: float = 1.0  # of the loss

    def to(self, device: torch.device) -> ToyBatch:
        return dataclasses.replace(self, inputs=self.inputs.to(device))


class Trunk(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(D)
        self.conv = nn.Conv1d(D, D, 3, padding=1, groups=4)
        self.layer_scale = nn.Parameter(torch.ones(1, D))
        self.ffn = nn.Sequential(
            nn.Linear(D, 2 * D), nn.GELU(), nn.Dropout(0.1), nn.Linear(2 * D, D)
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]"""
        x = self.norm(x)
        x = x + self.conv(x.transpose(1, 2)).transpose(1, 2) * self.layer_scale
        return x + self.ffn(x)  # type: ignore[no-any-return]


class Toy(Task):
    """A task with a teacher that follows only the trunk."""

    teacher: Trunk

    def __init__(self) -> None:
        super().__init__()
        self.front = nn.ModuleDict({"a": nn.Linear(C, D), "b": nn.Linear(C, D, bias=False)})
        self.trunk = Trunk()
        self.head = nn.ModuleDict({"a": nn.Linear(D, D), "b": nn.Linear(D, D)})
        self.teacher = copy.deepcopy(self.trunk).eval().requires_grad_(False)

    def train(self, mode: bool = True) -> Toy:
        super().train(mode)
        self.teacher.eval()
        return self

    @classmethod
    def create(cls, config: Config) -> Toy:
        return cls()

    def part(self, name: str) -> str:
        return part_of(name)

    def averages(self) -> dict[str, str]:
        return {f"teacher.{name}": f"trunk.{name}" for name, _ in self.trunk.named_parameters()}

    def forward(  # type: ignore[override]
        self, batch: ToyBatch, count: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        front = self.front[batch.modality]
        tokens = front(batch.inputs.to(front.weight.dtype))
        with torch.no_grad():
            targets = self.teacher(tokens.detach())
        out = self.head[batch.modality](self.trunk(tokens))
        loss = F.mse_loss(out.float(), targets.float(), reduction="sum") / D / count
        return loss * batch.scale, {"loss": loss.detach()}


def part_of(name: str) -> str:
    pieces = name.split(".")
    return pieces[1] if pieces[0] in ("front", "head") else ""


def build(decay_all: bool = False) -> tuple[Toy, list[ParamGroup]]:
    torch.manual_seed(0)
    toy = Toy()
    nn.init.normal_(toy.trunk.layer_scale)
    toy.teacher.load_state_dict(toy.trunk.state_dict())
    averaged = lambda name: name.startswith("trunk.")  # noqa: E731
    return toy, param_groups(toy, part_of, averaged, decay_all=decay_all)


def batches_of(step: int, count: int, modality: str) -> list[ToyBatch]:
    """All micro-batches of a step, of unequal shapes; identical on every rank."""
    g = torch.Generator().manual_seed(step)
    return [
        ToyBatch(
            modality, i, torch.randn(1 + (i + step) % 3, 4 + (3 * i + step) % 7, C, generator=g)
        )
        for i in range(count)
    ]


@dataclass(frozen=True)
class Plan:
    """Settings of a training run."""

    config: str = "local"
    precision: str = "fp32"
    steps: int = 20
    micro_batches: int = 4  # per step, over all ranks
    modalities: str = "aabab"  # one letter per step, repeated cyclically
    optim: Optim = field(
        default_factory=lambda: Optim(lr=1e-2, eps=1e-3, weight_decay=0.1, clip=0.3)
    )
    overrides: dict[str, Any] = field(default_factory=lambda: BUCKETS)
    poison: int = -1  # the step in which one micro-batch has a loss of inf
    decay: float = 0.9  # EMA decay of the teacher

    def modality(self, step: int) -> str:
        return self.modalities[step % len(self.modalities)]


class Trainer:
    """The training loop around an engine."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        ranks = 1 if plan.config == "local" else dist.get_world_size()
        rank = 0 if plan.config == "local" else dist.get_rank()
        self.accumulation = plan.micro_batches // ranks
        self.mine = slice(rank * self.accumulation, (rank + 1) * self.accumulation)
        self.toy, _ = build(plan.optim.decay_all)
        engine, ema = create_engine_and_ema(
            self.toy,
            settings=EngineSettings(config=plan.config, precision=plan.precision),  # type: ignore[arg-type]
            optim=plan.optim,
            accumulation=self.accumulation,
            device=CPU,
            overrides={} if plan.config == "local" else plan.overrides,
        )
        assert ema is not None
        self.engine, self.ema = engine, ema
        self.losses: list[float] = []  # sum over this rank's micro-batches, one per step
        self.norms: list[float] = []
        self.applied: list[bool] = []

    def step(self, step: int) -> bool:
        plan = self.plan
        batches = batches_of(step, plan.micro_batches, plan.modality(step))
        count = sum(batch.inputs.shape[0] * batch.inputs.shape[1] for batch in batches)
        mine = [
            dataclasses.replace(batch, scale=float("inf"))
            if step == plan.poison and batch.index == 1
            else batch
            for batch in batches[self.mine]
        ]
        settings = StepSettings(
            step=step,
            lr=plan.optim.lr * (1 + step % 3),
            weight_decay=plan.optim.weight_decay,
            ema_decay=plan.decay,
        )
        losses = Losses()
        applied = train_step(
            self.engine, self.ema, step_batch(mine, count), settings, seed=0, observer=losses
        )
        self.losses.append(sum(losses.values))
        self.norms.append(self.engine.grad_norm().item())
        self.applied.append(applied)
        return applied

    def run(self) -> Trainer:
        for step in range(self.plan.steps):
            self.step(step)
        return self

    def state(self) -> dict[str, tuple[int, dict[str, Tensor]]]:
        """{name: (offset, copies of this rank's partition)}."""
        return {
            name: (
                partition.offset,
                {
                    key: getattr(partition, key).clone()
                    for key in ("master", "exp_avg", "exp_avg_sq", "adam_step")
                },
            )
            for name, partition in self.engine.partitions().items()
        }

    def weights(self) -> dict[str, Tensor]:
        """Copies of all weights that the forward pass uses; at stage 3, this rank's partitions."""
        return {
            name: getattr(p, "ds_tensor", p).detach().clone()
            for name, p in self.toy.named_parameters()
        }


def whole(states: list[dict[str, tuple[int, dict[str, Tensor]]]]) -> dict[str, dict[str, Tensor]]:
    """Full flat tensors by parameter name, assembled from the ranks' partitions."""
    pieces: dict[str, dict[int, dict[str, Tensor]]] = {}
    for state in states:
        for name, (offset, values) in state.items():
            pieces.setdefault(name, {})[offset] = values
    return {
        name: {
            key: torch.cat([at[o][key] for o in sorted(at)]) if key != "adam_step" else at[0][key]
            for key in ("master", "exp_avg", "exp_avg_sq", "adam_step")
        }
        for name, at in pieces.items()
    }
