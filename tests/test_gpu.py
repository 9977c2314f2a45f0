"""Tests that need a GPU: bf16 and fp16 under ZeRO 1 to 3 and offload, no hidden synchronisation,
resume. Run by `make test-gpu`; skipped without a CUDA device."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from d2v_ds import recipes, seeding
from d2v_ds.distributed import process_group
from d2v_ds.distributed.world import World
from d2v_ds.pretrain import Pretrain
from d2v_ds.step import Observer, StepSettings, train_step
from tests import ROOT
from tests.engine.test_parity import BUCKETS, SETTINGS
from tests.helpers.steps import prepare, step_batch
from tests.test_train import QUICK

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

STEPS = 10
CASES = [(f"zero{stage}", precision) for stage in (1, 2, 3) for precision in ("bf16", "fp16")]


class NoWaiting(Observer):
    """Raises if the forward pass or the EMA synchronises with the GPU. The optimizer synchronises
    once, to check for overflow."""

    def __init__(self, strict: bool) -> None:
        self.strict = strict
        self.losses: list[torch.Tensor] = []

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        watched = self.strict and part in ("forward", "ema")
        torch.cuda.set_sync_debug_mode("error" if watched else "default")
        yield
        torch.cuda.set_sync_debug_mode("default")

    def add(self, modality: str, sums: Mapping[str, torch.Tensor]) -> None:
        self.losses.append(sums["loss"])


def steps_on_gpu(stage: str, precision: str) -> dict[str, Any]:
    """Losses of a few steps and the number of applied steps, checked by NoWaiting."""
    device = torch.device("cuda", 0)
    process_group.init(World(), device)
    config = recipes.load("speech_tiny", SETTINGS)
    torch.manual_seed(0)
    task = Pretrain.create(config).train()
    engine, ema = prepare(
        task, config.optim, stage=stage, precision=precision, zero=BUCKETS, device=device
    )
    rng = np.random.default_rng(0)
    waveforms = [rng.standard_normal(16000).astype(np.float32) for _ in range(4)]
    rngs = [seeding.generator(0, i) for i in range(4)]
    batch = task.modalities["speech"].collate(waveforms, rngs, 0).to(device)
    losses, taken = [], 0
    for step in range(STEPS):
        # The first steps allocate, autotune and build buffers.
        observer = NoWaiting(strict=step > 3)
        settings = StepSettings(step=step, lr=1e-3, weight_decay=0.01, ema_decay=0.9)
        batches = step_batch([batch], batch.masked.numel())
        taken += train_step(engine, ema, batches, settings, seed=0, observer=observer)
        losses += [loss.item() for loss in observer.losses]
    process_group.shutdown()
    return {"losses": losses, "taken": taken}


def in_process(*arguments: str) -> dict[str, Any]:
    """Runs in a separate process, because DeepSpeed and CUDA keep state."""
    code = (
        "import json; from tests.test_gpu import steps_on_gpu; "
        f"print(json.dumps(steps_on_gpu(*{arguments!r})))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
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
    assert found["taken"] >= STEPS - (3 if precision == "fp16" else 0)  # the loss scale may settle
    assert all(math.isfinite(loss) for loss in found["losses"])
    if found["taken"] == STEPS:
        assert found["losses"] == pytest.approx(reference["losses"], rel=0.03)


@pytest.mark.skipif(not shutil.which("nvcc"), reason="DeepSpeed builds its quantizer with nvcc")
def test_quantised_communication_trains(reference: dict[str, Any]) -> None:
    """With int8 weights and int4 gradients, losses are only close to those of full precision."""
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
    # Not bit-identical, because some kernels sum in a varying order.
    assert train("cut", "run.steps=12") == pytest.approx(train("whole", "run.steps=12"), rel=1e-2)
