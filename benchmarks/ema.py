"""Measures the teacher: how exact its average is, what it costs in memory and in time.

    python benchmarks/ema.py [--skip PART ...] [--json FILE]      prints Markdown; PART: error,
                                                                 memory, time

error: how much of an average's intended movement is made in 2000 steps towards a student that
stands still, at a relative distance of 10 %, 1 % and 0.1 %; the projection of the movement on that
of the exact average, the least over the parameters.
memory: bytes on a rank by ZeRO stage and ranks, in bf16, with two micro-batches a rank, at the
most of the moments after a backward pass and after a step, against the formula of `d2v-ds show`.
time: share that the average and its publication take of a step of one micro-batch, the least that a
rank does in a step, for the base recipes at their own size.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing
from torch import Tensor

from d2v_ds import recipes, seeding
from d2v_ds.config import Config, EngineSettings
from d2v_ds.distributed import process_group
from d2v_ds.distributed.world import World
from d2v_ds.engine import create_engine
from d2v_ds.engine.optimizer import param_groups
from d2v_ds.pretrain import Pretrain
from d2v_ds.show import LONGEST, micro_batch_samples
from d2v_ds.show.memory import largest_batch, sizes, state_bytes
from d2v_ds.teacher import Ema, move
from d2v_ds.train import create_parts

STEPS = 2000
DECAYS = (0.999, 0.9999, 0.99999, 0.999999)
GAPS = (0.1, 0.01, 0.001)
SHAPES = ((256, 256), (768,), (12,))  # a matrix, a bias, one number a head
RANKS = (1, 2, 4)

# --------------------------------------------------------------------------------------- error

Update = Callable[[list[Tensor], list[Tensor], float], None]


def lerp(averages: list[Tensor], students: list[Tensor], decay: float) -> None:
    torch._foreach_lerp_(averages, students, 1.0 - decay)


def mul_add(averages: list[Tensor], students: list[Tensor], decay: float) -> None:
    torch._foreach_mul_(averages, decay)
    torch._foreach_add_(averages, students, alpha=1.0 - decay)


def error_rows() -> list[dict[str, Any]]:
    """{decay, gap, ours, fp32 lerp, fp32 mul-add, bf16: least share of the movement realised}."""
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
BUCKET = 100_000  # elements; DeepSpeed's buffers are of this size and not of the model's
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
            torch.multiprocessing.spawn(memory_on_rank, (ranks, folder), ranks)
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
    tracked = task.averages()
    P, A = sizes(task)  # before ZeRO 3 hides them
    engine = create_engine(
        task,
        param_groups(task, task.part, set(tracked.values()).__contains__, decay_all=False),
        settings=EngineSettings(config=f"zero{stage}", precision="bf16"),
        optim=config.optim,
        accumulation=2,
        device=torch.device("cpu"),
        overrides=OVERRIDES,
    )
    ema = Ema(engine, task.teacher, tracked, "teacher.")
    measured = 0
    for step in range(2):
        waves = torch.randn(2, 8000, generator=torch.Generator().manual_seed(step)).numpy()
        for i, wave in enumerate(waves):
            batch = modality.collate([wave], [seeding.generator(step, rank, i)], i)
            loss, _ = engine(batch, 2 * ranks * batch.masked.numel())
            engine.backward(loss)
            del loss
            measured = max(measured, tensor_bytes() - before)
        assert engine.step(1e-4, 0.01, "speech")
        ema.update(0.999, "speech")
        measured = max(measured, tensor_bytes() - before)
    formula = state_bytes(P, A, stage, ranks, 2)
    row = {
        "stage": stage,
        "ranks": ranks,
        "bytes": measured,
        "formula": formula,
        "measured / formula": round(measured / formula, 3),
        "bytes a parameter": round(measured / P, 2),
    }
    engine._engine.destroy()  # type: ignore[attr-defined]
    return row


def tensor_bytes() -> int:
    """Of all tensors that live in this process."""
    gc.collect()
    found = [o for o in gc.get_objects() if issubclass(type(o), Tensor)]
    found += [t.grad for t in found if t.is_leaf and t.grad is not None]
    storages = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in found)}
    return sum(storages.values())


# ---------------------------------------------------------------------------------------- time


BASES = ("speech_base", "vision_base", "text_base")


def time_row(recipe: str, steps: int) -> dict[str, Any]:
    """Steps of one micro-batch, as long as the recipe has it, of samples without content."""
    config = Pretrain.resolve(recipes.load(recipe, ["engine.config=local"]))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    task = Pretrain.create(config).train()
    [(name, modality)] = task.modalities.items()
    samples = micro_batch_samples(config, modality)
    batch = largest_batch(task, name, samples).to(device)
    engine, ema = create_parts(config, task, 1, device)
    rest, own = [], []
    for _ in range(steps + 1):
        start = now(device)
        loss, _ = engine(batch, batch.masked.numel())
        engine.backward(loss)
        engine.step(1e-6, 0.0, name)
        middle = now(device)
        ema.update(0.999, name)
        own.append(now(device) - middle)
        rest.append(middle - start)
    ours, whole = statistics.median(own[1:]), statistics.median(rest[1:])
    return {
        "recipe": recipe,
        "device": f"{device.type}, {torch.get_num_threads()} threads",
        "micro-batch": f"{samples * modality.cost(LONGEST):g} {modality.unit}",
        "step, s": round(ours + whole, 2),
        "average and publication, s": round(ours, 3),
        "share": f"{ours / (ours + whole):.2%}",
    }


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


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
    parser.add_argument("--steps", type=int, default=3, help="timed, after one that is not")
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
