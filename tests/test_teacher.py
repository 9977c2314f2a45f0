"""The teacher's average compared with float64, at decays where plain fp32 is too imprecise."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from d2v_ds.teacher import in_chunks, move
from tests.helpers.toy import Plan, Trainer

STEPS = 2000
DECAYS = (0.999, 0.9999, 0.99999, 0.999999)
GAPS = (0.1, 0.01, 0.001)  # between student and teacher, relative to the spread of the weights


def pair(gap: float, n: int = 4096) -> tuple[Tensor, Tensor]:
    """(teacher, student), flat fp32."""
    generator = torch.Generator().manual_seed(0)
    teacher = 0.02 * torch.randn(n, generator=generator)
    return teacher, teacher + gap * 0.02 * torch.randn(n, generator=generator)


def realised(start: Tensor, end: Tensor, exact: Tensor) -> float:
    """The realised share of the exact movement: the projection onto it."""
    wanted = exact - start.double()
    return float((end.double() - start.double()) @ wanted / (wanted @ wanted))


@pytest.mark.parametrize("gap", GAPS)
@pytest.mark.parametrize("decay", DECAYS)
def test_the_whole_movement_is_realised(decay: float, gap: float) -> None:
    start, student = pair(gap)
    values, compensation = start.clone(), torch.zeros_like(start)
    for _ in range(STEPS):
        move([values], [compensation], [student], 1.0 - decay)
    exact = student.double() - decay**STEPS * (student.double() - start.double())
    for few in (slice(None), slice(0, 12)):  # a parameter may have only one number per head
        average = values[few].double() + compensation[few].double()
        assert realised(start[few], average, exact[few]) == pytest.approx(1, abs=1e-5)
    assert realised(start, values, exact) >= 0.999  # the published weights
    digit = torch.nextafter(values.abs(), torch.tensor(torch.inf)) - values.abs()
    error = (values.double() - exact).abs()
    assert bool((error <= 0.55 * digit + 2e-6 * (exact - start).abs()).all())


@pytest.mark.parametrize(("decay", "gap"), [(0.99999, 0.001), (0.999999, 0.01)])
def test_plain_fp32_fails_the_same_measure(decay: float, gap: float) -> None:
    start, student = pair(gap)
    values = start.clone()
    for _ in range(STEPS):
        values.lerp_(student, 1.0 - decay)
    exact = student.double() - decay**STEPS * (student.double() - start.double())
    assert realised(start, values, exact) < 0.9


def test_a_moving_student_is_followed() -> None:
    generator = torch.Generator().manual_seed(1)
    start, student = pair(0.01)
    values, compensation, exact = start.clone(), torch.zeros_like(start), start.double()
    for step in range(STEPS):
        student.add_(torch.randn(len(student), generator=generator), alpha=1e-4)
        decay = 0.999 + 0.000999 * step / STEPS
        move([values], [compensation], [student], 1.0 - decay)
        exact.lerp_(student.double(), 1.0 - decay)
    assert (values.double() + compensation.double() - exact).abs().max() < 2e-9
    assert realised(start, values, exact) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("size", [1, 7, 16, 1000])
def test_chunks_are_views_of_every_element_once(size: int) -> None:
    lengths = (5, 0, 16, 1, 40)
    pieces = [tuple(torch.zeros(n) for _ in range(3)) for n in lengths]
    chunks = in_chunks(pieces, size)  # type: ignore[arg-type]
    assert len(chunks) == -(-sum(lengths) // size)
    for chunk in chunks:
        assert sum(map(len, chunk[0])) <= size
        for which, views in enumerate(chunk):
            for view in views:
                view += which + 1.0
    for piece in pieces:
        for which, whole in enumerate(piece):
            assert bool((whole == which + 1.0).all())


def test_chunks_give_bit_identical_results() -> None:
    """The partitioning of a parameter over ranks therefore has no effect either."""
    start, student = pair(0.01, 1003)
    results = []
    for size in (1003, 10, 3):
        values, compensation = start.clone(), torch.zeros_like(start)
        for _ in range(5):
            for chunk in in_chunks([(values, compensation, student)], size):
                move(*chunk, 0.001)
        results.append((values, compensation))
    for values, compensation in results[1:]:
        assert torch.equal(values, results[0][0]) and torch.equal(compensation, results[0][1])


def test_update_follows_the_masters_of_an_engine() -> None:
    trainer = Trainer(Plan(decay=0.99999))
    exact = {name: value.double() for name, (_, value) in trainer.ema.values.items()}
    for step in range(50):
        assert trainer.step(step)
        for name, partition in trainer.engine.partitions().items():
            if name.startswith("trunk."):
                exact[f"teacher.{name[6:]}"].lerp_(partition.master.double(), 1.0 - 0.99999)
    assert exact.keys() == trainer.ema.values.keys()
    teacher = dict(trainer.toy.named_parameters())
    for name, (_, value) in trainer.ema.values.items():
        average = value.double() + trainer.ema.compensation[name][1].double()
        assert (average - exact[name]).abs().max() < 1e-10, name
        assert torch.equal(teacher[name].view(-1), value), name
