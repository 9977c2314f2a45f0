"""Measures the exactness of the teacher's moving average, and its cost in memory and time.

    python benchmarks/ema.py [--skip PART ...] [--json FILE]      prints Markdown; PART: error,
                                                                 memory, time

error: the fraction of the exact movement of an average that is achieved in 2000 steps towards a
constant student at a relative distance of 10 %, 1 % and 0.1 %: the projection of the movement onto
the exact movement; the minimum over the parameters.
memory: bytes per rank by ZeRO stage and number of ranks, in bf16 with two micro-batches per rank:
the maximum after any backward pass or EMA update, compared with the formula of `d2v-ds show`.
time: the fraction of a step spent on updating and publishing the average, for steps of one
micro-batch of the size in the base recipes, which is the minimum work of a rank per step.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from timing import Clock
from torch import Tensor, multiprocessing

from d2v_ds import recipes, seeding
from d2v_ds.batch import StepBatch
from d2v_ds.config import Config, EngineSettings
from d2v_ds.distributed import process_group
from d2v_ds.distributed.world import World
from d2v_ds.pretrain import Pretrain
from d2v_ds.show import LONGEST, micro_batch_samples
from d2v_ds.show.memory import largest_batch, sizes, state_bytes
from d2v_ds.step import Observer, StepSettings, create_engine_and_ema, train_step
from d2v_ds.teacher import move

STEPS = 2000
DECAYS = (0.999, 0.9999, 0.99999, 0.999999)
GAPS = (0.1, 0.01, 0.001)
SHAPES = ((256, 256), (768,), (12,))  # a matrix, a bias, one number per head
RANKS = (1, 2, 4)

# --------------------------------------------------------------------------------------- error

Update = Callable[[list[Tensor], list[Tensor], float], None]


def lerp(averages: list[Tensor], students: list[Tensor], decay: float) -> None:
    torch._foreach_lerp_(averages, students, 1.0 - decay)


def mul_add(averages: list[Tensor], students: list[Tensor], decay: float) -> None:
    torch._foreach_mul_(averages, decay)
    torch._foreach_add_(averages, students, alpha=1.0 - decay)


def error_rows() -> list[dict[str, Any]]:
    """{decay, gap, ours, fp32 lerp, fp32 mul-add, bf16: minimum fraction of the movement}."""
    rows = []
    for decay in DECAYS:
        for gap in GAPS:
            generator = torch.Generator().manual_seed(0)
            start = [0.02 * torch.randn(shape, generator=generator) for shape in SHAPES]
            student = [s + gap * 0.02 * torch.randn(s.shape, generator=generator) for s in start]
            rows.append(
                {
                    "decay": decay,
                    "gap": gap,
                    "ours": realised(start, student, ours(start, student, decay), decay),
                    "fp32 lerp": plain(lerp, torch.float32, start, student, decay),
                    "fp32 mul-add": plain(mul_add, torch.float32, start, student, decay),
                    "bf16": plain(lerp, torch.bfloat16, start, student, decay),
                }
            )
    return rows


def ours(start: list[Tensor], student: list[Tensor], decay: float) -> list[Tensor]:
    """The average is the sum of its values and their compensation."""
    values = [s.clone() for s in start]
    compensation = [torch.zeros_like(s) for s in start]
    for _ in range(STEPS):
        move(values, compensation, student, 1.0 - decay)
    return [v.double() + c.double() for v, c in zip(values, compensation, strict=True)]


def plain(
    update: Update, dtype: torch.dtype, start: list[Tensor], student: list[Tensor], decay: float
) -> float:
    start, student = ([t.to(dtype) for t in tensors] for tensors in (start, student))
    averages = [s.clone() for s in start]
    for _ in range(STEPS):
        update(averages, student, decay)
    return realised(start, student, averages, decay)


def realised(start: list[Tensor], student: list[Tensor], end: list[Tensor], decay: float) -> float:
    shares = []
    for a, b, got in zip(start, student, end, strict=True):
        wanted = ((1.0 - decay**STEPS) * (b.double() - a.double())).flatten()
        shares.append(float((got.double() - a.double()).flatten() @ wanted / (wanted @ wanted)))
    return round(min(shares), 4) + 0.0  # no minus zero


# -------------------------------------------------------------------------------------- memory

SETTINGS = [
    "model.dim=256",
    "model.depth=6",
    "modality.speech.views=1",
    "data.shards=none",
    "optim.clip=1.0",
]
BUCKET = 100_000  # elements; the size of DeepSpeed's buffers, independent of the model
OVERRIDES = {
    "zero_optimization": {
        "reduce_bucket_size": BUCKET,
        "allgather_bucket_size": BUCKET,
        "stage3_prefetch_bucket_size": BUCKET,
        "stage3_param_persistence_threshold": 0,
        "overlap_comm": False,
    }
}


def memory_rows() -> list[dict[str, Any]]:
    rows = []
    for ranks in RANKS:
        with tempfile.TemporaryDirectory() as folder:
            multiprocessing.spawn(memory_on_rank, (ranks, folder), ranks)  # type: ignore[attr-defined, no-untyped-call]
            measured = [json.loads(Path(folder, str(r)).read_text()) for r in range(ranks)]
        for stage in range(4):
            rows.append(max((of_rank[stage] for of_rank in measured), key=lambda r: r["bytes"]))
    return rows


def memory_on_rank(rank: int, ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ["DS_ACCELERATOR"] = "cpu"
    process_group.init(
        World(rank=rank, local_rank=rank, size=ranks, address="127.0.0.1", port=29653),
        torch.device("cpu"),
    )
    config = recipes.load("speech_tiny", SETTINGS)
    rows = [memory_of_stage(config, stage, rank, ranks) for stage in range(4)]
    Path(folder, str(rank)).write_text(json.dumps(rows))
    process_group.shutdown()


def memory_of_stage(config: Config, stage: int, rank: int, ranks: int) -> dict[str, Any]:
    before = tensor_bytes()
    torch.manual_seed(0)
    task = Pretrain.create(config).train()
    modality = task.modalities["speech"]
    P, A = sizes(task)  # before ZeRO 3 hides them
    engine, ema = create_engine_and_ema(
        task,
        settings=EngineSettings(config=f"zero{stage}", precision="bf16"),
        optim=config.optim,
        accumulation=2,
        device=torch.device("cpu"),
        overrides=OVERRIDES,
    )
    peak = Peak(before)
    for step in range(2):
        waves = torch.randn(2, 8000, generator=torch.Generator().manual_seed(step)).numpy()
        batches = [
            modality.collate([wave], [seeding.generator(step, rank, i)], i)
            for i, wave in enumerate(waves)
        ]
        count = ranks * sum(batch.masked.numel() for batch in batches)
        settings = StepSettings(step=step, lr=1e-4, weight_decay=0.01, ema_decay=0.999)
        step_batch = StepBatch("speech", batches, count, samples=2, units=1.0, cursor={})
        assert train_step(engine, ema, step_batch, settings, seed=0, observer=peak)
    measured = peak.bytes
    formula = state_bytes(P, A, stage, ranks, 2)
    row = {
        "stage": stage,
        "ranks": ranks,
        "bytes": measured,
        "formula": formula,
        "measured / formula": round(measured / formula, 3),
        "bytes per parameter": round(measured / P, 2),
    }
    engine._engine.destroy()  # type: ignore[attr-defined]
    return row


class Peak(Observer):
    """The peak tensor memory in bytes above `before`, after any backward pass or EMA update."""

    def __init__(self, before: int) -> None:
        self.before, self.bytes = before, 0

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        yield
        if part in ("backward", "ema"):
            self.bytes = max(self.bytes, tensor_bytes() - self.before)


def tensor_bytes() -> int:
    """The size of all tensors in this process."""
    gc.collect()
    found = [o for o in gc.get_objects() if issubclass(type(o), Tensor)]
    found += [t.grad for t in found if t.is_leaf and t.grad is not None]
    storages = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in found)}
    return sum(storages.values())


# ---------------------------------------------------------------------------------------- time


BASES = ("speech_base", "vision_base", "text_base")


def time_row(recipe: str, steps: int) -> dict[str, Any]:
    """Times steps of one micro-batch of the size in the recipe, with samples of zeros."""
    config = Pretrain.resolve(recipes.load(recipe, ["engine.config=local"]))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    task = Pretrain.create(config).train()
    [(name, modality)] = task.modalities.items()
    samples = micro_batch_samples(config, modality)
    batch = largest_batch(task, name, samples).to(device)
    engine, ema = create_engine_and_ema(
        task, settings=config.engine, optim=config.optim, accumulation=1, device=device
    )
    step_batch = StepBatch(name, [batch], batch.masked.numel(), samples, units=1.0, cursor={})
    wholes, shares = [], []
    for step in range(steps + 1):
        clock = Clock(device)
        settings = StepSettings(step=step, lr=1e-6, weight_decay=0.0, ema_decay=0.999)
        train_step(engine, ema, step_batch, settings, seed=0, observer=clock)
        wholes.append(sum(clock.seconds.values()))
        shares.append(clock.seconds["ema"])
    whole, ours = statistics.median(wholes[1:]), statistics.median(shares[1:])
    return {
        "recipe": recipe,
        "device": f"{device.type}, {torch.get_num_threads()} threads",
        "micro-batch": f"{samples * modality.cost(LONGEST):g} {modality.batch_unit}",
        "step, s": round(whole, 2),
        "EMA and publication, s": round(ours, 3),
        "share": f"{ours / whole:.2%}",
    }


# -------------------------------------------------------------------------------------- report


def table(rows: list[dict[str, Any]]) -> str:
    heads = list(rows[0])
    lines = [heads, ["---"] * len(heads), *([str(row[h]) for h in heads] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--skip", nargs="*", default=[], choices=["error", "memory", "time"])
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--recipes", nargs="*", default=BASES, help="timed")
    parser.add_argument("--steps", type=int, default=3, help="timed, after a warm-up")
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    if "error" not in arguments.skip:
        results["error"] = error_rows()
        print(table(results["error"]), end="\n\n", flush=True)
    if "memory" not in arguments.skip:
        results["memory"] = memory_rows()
        print(table(results["memory"]), end="\n\n", flush=True)
    if "time" not in arguments.skip:
        results["time"] = [time_row(recipe, arguments.steps) for recipe in arguments.recipes]
        print(table(results["time"]))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
