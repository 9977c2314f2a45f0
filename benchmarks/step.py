"""Times a pre-training step by part and prints one JSON object.

    python benchmarks/step.py [RECIPE] [key.path=value ...] [--steps 5]

Real audio (the embedded corpus, joined into long utterances), one rank, any engine that one rank
can run (engine.config=local by default). Seconds are medians over the steps after one warm-up.
`share` is each part's share of the step. `matmul_gflops`, measured around every step, tells how
fast the machine was, so that runs on a busy machine can be compared as ratios.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from d2v_ds import recipes
from d2v_ds.config import Config
from d2v_ds.distributed import process_group
from d2v_ds.distributed.world import World
from d2v_ds.pretrain import Pretrain
from d2v_ds.run.watchdog import Watchdog
from d2v_ds.seeding import seed_torch
from d2v_ds.train import TrainState, create_mixture, create_parts
from shards import samples
from shards.cli import main as shards_main

PARTS = ("data", "teacher", "student", "backward", "optimizer", "ema")


class Clock:
    """Seconds by part; waits for the GPU where there is one."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, defaultdict(float)

    def timed(self, part: str, function: Callable[..., Any], *arguments: Any) -> Any:
        self._wait()
        start = time.perf_counter()
        result = function(*arguments)
        self._wait()
        self.seconds[part] += time.perf_counter() - start
        return result

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def matmul_gflops(device: torch.device, n: int = 1024) -> float:
    a = torch.randn(n, n, device=device)
    clock = Clock(device)
    for _ in range(4):
        clock.timed("matmul", torch.mm, a, a)
    return 4 * 2 * n**3 / clock.seconds["matmul"] / 1e9


def measure(config: Config, steps: int) -> dict[str, Any]:
    device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
    process_group.init(World(), device)
    mixture = create_mixture(config, World(), TrainState(), Watchdog(0, 1))
    torch.manual_seed(0)
    task = Pretrain.create(config).train()
    engine, ema = create_parts(config, task, config.batch.micro_batches, device)
    rows, rates = [], []
    targets = task.targets
    for step in range(steps + 1):
        clock = Clock(device)
        task.targets = lambda *a, clock=clock: clock.timed("teacher", targets, *a)  # type: ignore[method-assign]
        rates.append(matmul_gflops(device))
        step_batch = clock.timed("data", mixture.next, step)
        for batch in step_batch.micro_batches:
            seed_torch(0, step, batch.index)
            batch = batch.to(device)
            loss, _ = clock.timed("forward", engine, batch, step_batch.masked_count)
            clock.timed("backward", engine.backward, loss)
        arguments = (1e-4, config.optim.weight_decay, step_batch.modality)
        clock.timed("optimizer", engine.step, *arguments)
        clock.timed("ema", ema.update, 0.999, step_batch.modality)
        clock.seconds["student"] = clock.seconds.pop("forward") - clock.seconds["teacher"]
        rows.append(dict(clock.seconds))
    mixture.close()
    process_group.shutdown()
    seconds = {part: statistics.median(row[part] for row in rows[1:]) for part in PARTS}
    whole = statistics.median(sum(row.values()) for row in rows[1:])
    return {
        "device": device.type,
        "threads": torch.get_num_threads(),
        "engine": config.engine.config,
        "parameters": sum(p.numel() for p in task.student.parameters()),
        "audio_seconds_a_step": step_batch.units,
        "views": step_batch.micro_batches[0].views,
        "micro_batches": len(step_batch.micro_batches),
        "step_seconds": round(whole, 4),
        "seconds": {part: round(value, 4) for part, value in seconds.items()},
        "share": {part: round(value / whole, 3) for part, value in seconds.items()},
        "matmul_gflops": {"min": round(min(rates), 1), "max": round(max(rates), 1)},
    }


def measure_recipe(recipe: str, overrides: list[str], steps: int) -> dict[str, Any]:
    """`measure` on the embedded corpus, joined into long utterances."""
    with tempfile.TemporaryDirectory() as folder:
        shards = Path(folder, "shards")
        source = samples.path("speech") / "train.tsv"
        code = shards_main(
            ["speech", str(source), str(shards), "--join", "speaker", "--join-seconds", "20"]
        )
        assert code == 0, "the embedded corpus could not be converted"
        settings = [f"data.shards={shards}", "data.workers=0", "engine.config=local"]
        config = recipes.load(recipe, [*settings, *overrides])
        return {"recipe": recipe, **measure(config, steps)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", nargs="?", default="speech_tiny")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    parser.add_argument("--steps", type=int, default=5)
    arguments, rest = parser.parse_known_args()
    overrides = [*arguments.overrides, *rest]
    print(json.dumps(measure_recipe(arguments.recipe, overrides, arguments.steps)))


if __name__ == "__main__":
    main()
