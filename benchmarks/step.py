"""Times a pre-training step by part and prints one JSON object.

    python benchmarks/step.py [RECIPE] [key.path=value ...] [--steps 5]

Uses real audio (the bundled corpus, joined into long utterances) and one rank, with any engine that
runs on one rank (engine.config=local by default). Seconds are medians over the steps after one
warm-up step. `share` is the fraction of the step that each part takes. `matmul_gflops`, measured
before every step, shows the speed of the machine, so that runs on a busy machine can be compared as
ratios.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from timing import Clock, matmul_gflops
from torch import Tensor

from d2v_ds import recipes
from d2v_ds.config import Config
from d2v_ds.distributed import process_group
from d2v_ds.distributed.world import World
from d2v_ds.pretrain import Pretrain
from d2v_ds.run.watchdog import Watchdog
from d2v_ds.start import create_mixture
from d2v_ds.step import StepSettings, create_engine_and_ema, train_step
from d2v_ds.train_state import TrainState
from shards import samples
from shards.cli import main as shards_main

PARTS = ("data", "teacher", "student", "backward", "optimizer", "ema")


def measure(config: Config, steps: int) -> dict[str, Any]:
    device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
    process_group.init(World(), device)
    torch.manual_seed(0)
    task = Pretrain.create(config).train()
    mixture = create_mixture(config, task.modalities, World(), TrainState(), Watchdog(0, 1))
    engine, ema = create_engine_and_ema(
        task,
        settings=config.engine,
        optim=config.optim,
        accumulation=config.batch.micro_batches,
        device=device,
    )
    rows, rates = [], []
    targets = task.targets
    for step in range(steps + 1):
        clock = Clock(device)

        def timed_targets(*arguments: Any, clock: Clock = clock) -> Tensor:
            with clock.timed("teacher"):
                return targets(*arguments)

        task.targets = timed_targets  # type: ignore[method-assign, assignment]
        rates.append(matmul_gflops(device))
        with clock.timed("data"):
            step_batch = mixture.next(step)
        settings = StepSettings(
            step=step, lr=1e-4, weight_decay=config.optim.weight_decay, ema_decay=0.999
        )
        train_step(engine, ema, step_batch, settings, seed=0, observer=clock)
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
        "audio_seconds_per_step": step_batch.units,
        "views": step_batch.micro_batches[0].views,
        "micro_batches": len(step_batch.micro_batches),
        "step_seconds": round(whole, 4),
        "seconds": {part: round(value, 4) for part, value in seconds.items()},
        "share": {part: round(value / whole, 3) for part, value in seconds.items()},
        "matmul_gflops": {"min": round(min(rates), 1), "max": round(max(rates), 1)},
    }


def measure_recipe(recipe: str, overrides: list[str], steps: int) -> dict[str, Any]:
    """`measure` on the bundled corpus, joined into long utterances."""
    with tempfile.TemporaryDirectory() as folder:
        shards = Path(folder, "shards")
        source = samples.path("speech") / "train.tsv"
        code = shards_main(
            ["speech", str(source), str(shards), "--join", "speaker", "--join-seconds", "20"]
        )
        assert code == 0, "the bundled corpus could not be converted"
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
