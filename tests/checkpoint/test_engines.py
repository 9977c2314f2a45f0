"""A checkpoint of one ZeRO stage and number of ranks resumes on other stages and ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from d2v_ds import checkpoint
from d2v_ds.checkpoint.format import EMA_KINDS
from d2v_ds.engine import EmaKind
from d2v_ds.run.run_folder import Generation, RunFolder, claim_generation
from tests.helpers.toy import Plan, Trainer, build, whole

BEFORE, AFTER = 4, 5  # steps; in both phases, parts of the model are sometimes idle
SHAPES = {name: tuple(parameter.shape) for name, parameter in build()[0].named_parameters()}


@dataclass
class Outcome:
    """Result of one rank."""

    state: dict[str, tuple[int, dict[str, Tensor]]]  # at the checkpoint
    ema: dict[EmaKind, dict[str, tuple[int, Tensor]]]
    losses: list[float]  # of the steps after the checkpoint


def train_and_save(root: Path, generation: Generation, plan: Plan) -> Outcome:
    """Trains, saves a checkpoint and continues."""
    trainer = Trainer(plan).run()
    replicated = trainer.engine.replicated
    saver = checkpoint.Saver(RunFolder(root), generation, keep=1, replicated=replicated)
    saver.start(
        BEFORE,
        partitions=trainer.engine.partitions(),
        ema=trainer.ema.pieces,
        shapes=SHAPES,
        state={},
    )
    outcome = go_on(trainer)  # later steps must not change the checkpoint
    saver.finish()
    return outcome


def load_and_train(root: Path, plan: Plan) -> Outcome:
    """Trains a new engine, restores it and continues. The earlier steps must have no effect."""
    trainer = Trainer(replace(plan, steps=1)).run()
    opened = checkpoint.newest_verified(RunFolder(root))
    assert opened is not None
    opened.restore(trainer.engine.partitions(), trainer.ema.pieces, SHAPES)
    trainer.engine.refresh()
    trainer.ema.publish()
    return go_on(trainer)


def go_on(trainer: Trainer) -> Outcome:
    state = trainer.state()
    ema = {
        kind: {name: (offset, values.clone()) for name, (offset, values) in pieces.items()}
        for kind, pieces in trainer.ema.pieces.items()
    }
    trainer.losses.clear()
    for step in range(BEFORE, BEFORE + AFTER):
        trainer.step(step)
    return Outcome(state, ema, trainer.losses)


def whole_state(outcomes: list[Outcome]) -> dict[str, Any]:
    """Every value at the checkpoint, over all ranks."""
    values: dict[str, Any] = {
        f"{kind}/{name}": tensor.tolist()
        for name, kinds in whole([outcome.state for outcome in outcomes]).items()
        for kind, tensor in kinds.items()
    }
    pieces: dict[str, dict[int, Tensor]] = {}
    for outcome in outcomes:
        for kind, owned in outcome.ema.items():
            for name, (offset, tensor) in owned.items():
                pieces.setdefault(f"{kind}/{name}", {})[offset] = tensor
    for name, at in pieces.items():
        values[name] = torch.cat([at[offset] for offset in sorted(at)]).tolist()
    return values


def total(outcomes: list[Outcome]) -> list[float]:
    """Each step's loss, over all ranks."""
    return [sum(of_step) for of_step in zip(*(o.losses for o in outcomes), strict=True)]


Saved = Callable[[str, int, str], tuple[RunFolder, list[Outcome]]]


@pytest.fixture(scope="module")
def saved(pool: Any, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """saved(engine, ranks, precision): a run with a checkpoint and later steps, trained once."""
    runs: dict[tuple[str, int, str], tuple[RunFolder, list[Outcome]]] = {}

    def save(engine: str, ranks: int, precision: str) -> tuple[RunFolder, list[Outcome]]:
        if (engine, ranks, precision) not in runs:
            run = RunFolder(tmp_path_factory.mktemp("run"))
            plan: Any = replace(Plan(steps=BEFORE), config=engine, precision=precision)
            arguments = (run.root, claim_generation(run, "local"), plan)
            outcomes = pool.run(ranks, train_and_save, *arguments, timeout=120)
            runs[engine, ranks, precision] = run, outcomes
        return runs[engine, ranks, precision]

    return save


@pytest.mark.parametrize(
    ("written", "ranks", "read", "new_ranks", "precision"),
    [
        ("zero0", 2, "zero1", 2, "fp32"),
        ("zero1", 2, "zero3", 2, "fp32"),
        ("zero2", 2, "zero2", 2, "fp32"),
        ("zero2", 2, "local", 1, "fp32"),
        ("zero3", 2, "zero3", 2, "fp32"),
        ("zero3", 2, "zero2", 2, "fp32"),
        ("zero3", 2, "zero0", 4, "fp32"),
        ("local", 1, "zero3", 2, "fp32"),
        ("zero3", 2, "zero3", 2, "bf16"),
        ("zero3", 2, "zero1", 2, "bf16"),
    ],
)
def test_another_engine_resumes(
    run_ranks: Callable[..., list[Outcome]],
    saved: Saved,
    written: str,
    ranks: int,
    read: str,
    new_ranks: int,
    precision: str,
) -> None:
    run, ours = saved(written, ranks, precision)
    files = len(list(run.checkpoint(BEFORE).glob("*.safetensors")))
    assert files == (1 if written in ("local", "zero0") else ranks)
    plan: Any = replace(Plan(), config=read, precision=precision)
    theirs = run_ranks(new_ranks, load_and_train, run.root, plan)
    assert whole_state(theirs) == whole_state(ours)
    if (written, ranks) == (read, new_ranks):
        assert [o.losses for o in theirs] == [o.losses for o in ours]
    else:  # the order of sums depends on the stage and the number of ranks
        tolerance = 1e-6 if precision == "fp32" else 2e-3
        assert total(theirs) == pytest.approx(total(ours), rel=tolerance)


def test_weights_are_read_without_an_engine(saved: Saved) -> None:
    run, outcomes = saved("zero3", 2, "fp32")
    opened = checkpoint.open_checkpoint(run.checkpoint(BEFORE))
    expected = whole_state(outcomes)
    for name, values in opened.tensors("master").items():
        assert tuple(values.shape) == SHAPES[name]
        assert values.flatten().tolist() == expected[f"master/{name}"]
    for kind in EMA_KINDS:
        for name, values in opened.tensors(kind).items():
            assert tuple(values.shape) == SHAPES[name]
            assert values.flatten().tolist() == expected[f"{kind}/{name}"]
