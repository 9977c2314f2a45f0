"""What only a GPU can show: bf16 and fp16 under ZeRO 1 to 3 and offload, no hidden synchronisation,
resume. Run by `make test-gpu`; skipped where there is no CUDA device."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_parity import BUCKETS, SETTINGS
from test_train import QUICK

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

STEPS = 10
CASES = [(f"zero{stage}", precision) for stage in (1, 2, 3) for precision in ("bf16", "fp16")]


def steps_on_gpu(engine_config: str, precision: str) -> dict[str, Any]:
    """Losses and scale of a few steps; forward, backward and EMA must not wait for the GPU."""
    import numpy as np

    from d2v_ds import recipes, seeding
    from d2v_ds.distributed import process_group
    from d2v_ds.distributed.world import World
    from d2v_ds.engine import create_engine
    from d2v_ds.engine.optimizer import param_groups
    from d2v_ds.pretrain import build_pretrain
    from d2v_ds.seeding import seed_torch
    from d2v_ds.teacher import Ema

    device = torch.device("cuda", 0)
    process_group.init(World(), device)
    config = recipes.load("speech_tiny", SETTINGS)
    torch.manual_seed(0)
    task = build_pretrain(config).train()
    tracked = task.tracked()
    engine = create_engine(
        task,
        param_groups(task, task.part, set(tracked.values()).__contains__, decay_all=False),
        settings=type(config.engine)(config=engine_config, precision=precision),  # type: ignore[arg-type]
        optim=config.optim,
        accumulation=1,
        device=device,
        overrides=None if engine_config == "local" else {"zero_optimization": BUCKETS},
    )
    ema = Ema(engine, task.teacher, tracked, "teacher.")
    rng = np.random.default_rng(0)
    waveforms = [rng.standard_normal(16000).astype(np.float32) for _ in range(4)]
    rngs = [seeding.generator(0, i) for i in range(4)]
    batch = task.modalities["speech"].collate(waveforms, rngs, 0).to(device)
    count = batch.masked.numel()
    losses, taken = [], 0
    for step in range(STEPS):
        seed_torch(0, step, 0)
        # The first steps allocate, autotune and build buffers; later ones must not wait.
        torch.cuda.set_sync_debug_mode("error" if step > 3 else "default")
        loss, _ = engine(batch, count)
        torch.cuda.set_sync_debug_mode("default")
        engine.backward(loss)
        if engine.step(1e-3, 0.01, "speech"):  # reads the overflow flag: the one synchronisation
            taken += 1
            torch.cuda.set_sync_debug_mode("error" if step > 3 else "default")
            ema.update(0.9, "speech")
            torch.cuda.set_sync_debug_mode("default")
        losses.append(loss.item())
    process_group.shutdown()
    return {"losses": losses, "taken": taken}


def in_process(*arguments: str) -> dict[str, Any]:
    """In a process of its own: DeepSpeed and CUDA keep state."""
    code = f"import json, test_gpu; print(json.dumps(test_gpu.steps_on_gpu(*{arguments!r})))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent,
        env={**os.environ, "PYTHONPATH": f"{Path(__file__).parent.parent}:{Path(__file__).parent}"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def reference() -> dict[str, Any]:
    return in_process("local", "fp32")


@pytest.mark.parametrize(("engine_config", "precision"), [*CASES, ("offload", "bf16")])
def test_a_stage_trains_in_low_precision(
    engine_config: str, precision: str, reference: dict[str, Any]
) -> None:
    found = in_process(engine_config, precision)
    assert found["taken"] >= STEPS - (3 if precision == "fp16" else 0)  # the scale may settle first
    assert all(math.isfinite(loss) for loss in found["losses"])
    if found["taken"] == STEPS:
        assert found["losses"] == pytest.approx(reference["losses"], rel=0.03)


@pytest.mark.skipif(not shutil.which("nvcc"), reason="DeepSpeed builds its quantizer with nvcc")
def test_quantised_communication_trains(reference: dict[str, Any]) -> None:
    """Weights as int8, gradients as int4: the losses are near those of full precision, no more."""
    found = in_process("zero3_quantized", "bf16")
    assert found["taken"] == STEPS
    assert found["losses"] == pytest.approx(reference["losses"], rel=0.2)


def test_show_measures_on_the_gpu() -> None:
    from d2v_ds import recipes, show

    text = show.describe(recipes.load("speech_tiny", []), 2, measure=True)
    assert "speech: measured on this machine's cuda in bf16" in text


def test_a_run_on_a_gpu_resumes(tmp_path: Path) -> None:
    from shards import samples
    from shards.cli import main as shards_main

    shards = tmp_path / "shards"
    source = samples.path("speech") / "train.tsv"
    assert shards_main(["speech", str(source), str(shards), "--join", "speaker"]) == 0

    def train(name: str, *settings: str) -> list[float]:
        command = ["train", "speech_tiny", *QUICK, f"run.dir={tmp_path / name}"]
        words = [*command, f"data.shards={shards}", "optim.schedule=constant", *settings]
        done = subprocess.run(
            [sys.executable, "-m", "d2v_ds", *words, "--nproc", "1"],
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        rows = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return [json.loads(row)["loss"] for row in rows]

    train("cut", "run.steps=6")
    # Kernels that add in varying order leave the last digits open.
    assert train("cut", "run.steps=12") == pytest.approx(train("whole", "run.steps=12"), rel=1e-2)
