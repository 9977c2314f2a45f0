"""Joint training on every engine: a step of one modality is bit-identical to the same step in a run
with only this modality and does not change the parts of the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from d2v_ds import recipes, seeding
from d2v_ds.batch import Batch
from d2v_ds.config import Config
from d2v_ds.pretrain import Pretrain
from d2v_ds.seeding import seed_torch
from tests.helpers import joint_sets
from tests.helpers.steps import masked_tokens, prepare, take

RunRanks = Callable[..., list[Any]]
MICRO_BATCHES = 4
ORDER = ("speech", "vision", "text", "text", "speech", "vision", "speech")
BUCKETS = {
    "reduce_bucket_size": 5000,
    "allgather_bucket_size": 5000,
    "stage3_prefetch_bucket_size": 5000,
    "stage3_param_persistence_threshold": 100,
}


def load(*overrides: str) -> Config:
    return recipes.load("joint_tiny", [*joint_sets.SMALL, *overrides])


def load_alone(modality: str, *overrides: str) -> Config:
    """The same settings for one modality."""
    others = [f"modality.{name}=null" for name in ("speech", "vision", "text") if name != modality]
    return load(*others, *overrides)


def examples(task: Pretrain, modality: str, seed: int, number: int) -> list[Any]:
    rng = np.random.default_rng(seed)
    if modality == "speech":
        return [
            rng.standard_normal(int(n)).astype(np.float32)
            for n in rng.integers(5000, 12000, number)
        ]
    if modality == "text":
        return [rng.integers(4, 60, int(n)) for n in rng.integers(10, 40, number)]
    side = task.modalities["vision"].config.image_size
    return [rng.standard_normal((3, side, side)).astype(np.float32) for _ in range(number)]


def batches_of(task: Pretrain, modality: str, step: int) -> list[Batch]:
    """All micro-batches of a step, of unequal lengths."""
    samples = examples(task, modality, step, 2 * MICRO_BATCHES)
    kind = task.modalities[modality]
    return [
        kind.collate(
            samples[2 * i : 2 * i + 2], [seeding.generator(step, i, j) for j in range(2)], i
        )
        for i in range(MICRO_BATCHES)
    ]


class Trainer:
    """The training loop around the real task and an engine."""

    def __init__(self, config: Config, stage: str, precision: str) -> None:
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.config = config
        torch.manual_seed(0)
        self.task = Pretrain.create(config).train()
        self.engine, self.ema = prepare(
            self.task,
            config.optim,
            stage=stage,
            precision=precision,
            accumulation=MICRO_BATCHES // self.world,
            zero=BUCKETS,
        )

    def step(self, modality: str, step: int) -> list[float]:
        """Trains one optimizer step and returns this rank's losses."""
        batches = batches_of(self.task, modality, step)
        mine = MICRO_BATCHES // self.world
        own = batches[self.rank * mine : (self.rank + 1) * mine]
        return take(
            self.engine,
            self.ema,
            own,
            count=masked_tokens(batches),
            step=step,
            weight_decay=0.1,
        )

    def state(self) -> dict[str, Tensor]:
        """Live views of this rank's partitions and of the weights that its forward pass uses."""
        state: dict[str, Tensor] = {}
        for name, partition in self.engine.partitions().items():
            for key in ("master", "exp_avg", "exp_avg_sq", "adam_step"):
                state[f"{key}/{name}"] = getattr(partition, key)
        for kind, pieces in self.ema.pieces.items():
            state |= {f"{kind}/{name}": value for name, (_, value) in pieces.items()}
        for name, p in self.task.named_parameters():
            state[f"weight/{name}"] = getattr(p, "ds_tensor", p).detach()
        return state


def copies(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in state.items()}


def idle_parts(stage: str, precision: str) -> list[set[str]]:
    """The parts that each step changed on this rank. Asserts that the idle parts did not change."""
    trainer = Trainer(load(), stage, precision)
    moved = []
    for step, modality in enumerate(ORDER):
        before = copies(trainer.state())
        trainer.step(modality, step)
        parts = set()
        for name, value in trainer.state().items():
            part = trainer.task.part(name.partition("/")[2])
            if not torch.equal(value, before[name]):
                parts.add(part)
                assert part in ("", modality), f"step {step} of {modality} moved {name}"
        moved.append(parts)
    steps = {name: value for name, value in trainer.state().items() if name.startswith("adam_step")}
    for name, value in steps.items():
        part = trainer.task.part(name.partition("/")[2])
        assert value == (ORDER.count(part) if part else len(ORDER)), name
    return moved


CASES = [(f"zero{stage}", precision) for stage in range(4) for precision in ("fp32", "bf16")]


def cases(*quick: tuple[str, str]) -> list[Any]:
    """All stages and precisions; cases not in `quick` are slow tests."""
    return [pytest.param(*c, marks=[] if c in quick else [pytest.mark.slow]) for c in CASES]


@pytest.mark.parametrize(("stage", "precision"), cases(("zero2", "fp32"), ("zero3", "bf16")))
def test_a_step_of_one_modality_does_not_change_the_others(
    run_ranks: RunRanks, stage: str, precision: str
) -> None:
    results = run_ranks(2, idle_parts, stage, precision)
    for modality, *parts in zip(ORDER, *results, strict=True):
        assert set().union(*parts) == {"", modality}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_local_step_of_one_modality_does_not_change_the_others(
    run_ranks: RunRanks, precision: str
) -> None:
    [moved] = run_ranks(1, idle_parts, "local", precision)
    assert moved == [{"", modality} for modality in ORDER]


def alone(modality: str, stage: str, precision: str) -> tuple[list[float], list[float], list[str]]:
    """Runs the modality's steps in a joint run and, from the same state, in a run with only this
    modality. Returns the losses of both and the names of all differences after the steps."""
    # The norm for clipping is summed over partitions, whose boundaries differ between the models.
    no_clip = "optim.clip=0"
    joint = Trainer(load(no_clip), stage, precision)
    single = Trainer(load_alone(modality, no_clip), stage, precision)
    ours: list[float] = []
    theirs: list[float] = []
    wrong: list[str] = []
    for step, name in enumerate(ORDER):
        if name != modality:
            joint.step(name, step)
            continue
        copy_state(joint, single)
        ours += joint.step(modality, step)
        theirs += single.step(modality, step)
        expected = whole_state(joint)
        wrong += [n for n, v in whole_state(single).items() if not torch.equal(v, expected[n])]
        # Stale gradients of idle parts would only show in the norm.
        norms = [float(trainer.engine.grad_norm()) for trainer in (joint, single)]
        wrong += [f"norms {norms}"] if abs(norms[0] / norms[1] - 1) > 1e-5 else []
    return ours, theirs, wrong


def whole_state(trainer: Trainer) -> dict[str, Tensor]:
    """Full tensors by kind and name, assembled from all ranks' pieces."""
    pieces = {
        f"{key}/{name}": (partition.offset, getattr(partition, key).clone())
        for name, partition in trainer.engine.partitions().items()
        for key in ("master", "exp_avg", "exp_avg_sq")
    }
    pieces |= {
        f"{kind}/{name}": (offset, value.clone())
        for kind, values in trainer.ema.pieces.items()
        for name, (offset, value) in values.items()
    }
    gathered: list[Any] = [None] * trainer.world
    dist.all_gather_object(gathered, pieces)
    by_name: dict[str, dict[int, Tensor]] = {}
    for part in gathered:
        for name, (offset, value) in part.items():
            by_name.setdefault(name, {})[offset] = value
    return {name: torch.cat([at[o] for o in sorted(at)]) for name, at in by_name.items()}


def copy_state(source: Trainer, target: Trainer) -> None:
    """Copies the state between trainers with different partitions, as a checkpoint does."""
    whole = whole_state(source)
    steps: dict[str, float] = {}
    gathered: list[Any] = [None] * source.world
    dist.all_gather_object(
        gathered, {name: float(s.adam_step) for name, s in source.engine.partitions().items()}
    )
    for part in gathered:
        steps |= part
    for name, partition in target.engine.partitions().items():
        piece = slice(partition.offset, partition.offset + len(partition.master))
        for key in ("master", "exp_avg", "exp_avg_sq"):
            getattr(partition, key).copy_(whole[f"{key}/{name}"][piece])
        partition.adam_step.fill_(steps[name])
    for kind, values in target.ema.pieces.items():
        for name, (offset, value) in values.items():
            value.copy_(whole[f"{kind}/{name}"][offset : offset + len(value)])
    target.engine.refresh()
    target.ema.publish()


@pytest.mark.parametrize("modality", ["speech", "vision", "text"])
def test_a_step_equals_that_of_a_run_with_only_this_modality(
    run_ranks: RunRanks, modality: str
) -> None:
    [(ours, theirs, wrong)] = run_ranks(1, alone, modality, "local", "fp32")
    assert ours == theirs and len(ours) >= 2 * MICRO_BATCHES and not wrong


@pytest.mark.parametrize(("stage", "precision"), cases(("zero3", "bf16")))
def test_a_zero_step_equals_that_of_a_run_with_only_this_modality(
    run_ranks: RunRanks, stage: str, precision: str
) -> None:
    for ours, theirs, wrong in run_ranks(2, alone, "speech", stage, precision):
        assert ours == theirs and not wrong


def test_a_loss_weight_scales_gradients_but_not_the_logged_loss() -> None:
    losses = {}
    for weight in (1.0, 4.0):
        torch.manual_seed(0)
        task = Pretrain.create(load("model.dropout=0", f"modality.vision.loss_weight={weight}"))
        batch = batches_of(task, "vision", 0)[0]
        seed_torch(0, 0, 0)
        loss, stats = task.train()(batch, 10)
        loss.backward()
        grad = task.student.encoder.trunk.blocks[0].ffn.fc1.weight.grad
        losses[weight] = (loss.item(), stats["loss"].item(), grad)
    assert losses[4.0][0] == 4 * losses[1.0][0] and losses[4.0][1] == losses[1.0][1]
    torch.testing.assert_close(losses[4.0][2], 4 * losses[1.0][2])
