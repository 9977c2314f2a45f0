"""Schedules at their boundaries. test_golden.py compares whole schedules with the original code."""

from __future__ import annotations

import math

import pytest

from d2v_ds import recipes
from d2v_ds.config import Optim, TeacherSettings
from d2v_ds.schedules import (
    LEARNING_RATES,
    constant,
    cosine,
    cosine_beit,
    ema_decay,
    learning_rate,
    teacher_decay,
    tri_stage,
)

PEAK, WARMUP, STEPS, END = 2.0, 100, 1000, 0.5


@pytest.mark.parametrize(
    ("n", "expected"),
    [
        (0, 0.0),
        (50, 1.0),
        (99, 1.98),
        (100, 2.0),
        (550, 1.25),  # half of the cosine
        (1000, 0.5),
        (5000, 0.5),
    ],
)
def test_cosine(n: int, expected: float) -> None:
    assert cosine(n, PEAK, WARMUP, STEPS, END) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("n", "expected"),
    [(0, 0.0), (99, 2.0), (100, 2.0), (550, 1.25), (1000, 0.5), (5000, 0.5)],
)
def test_cosine_of_beit_reaches_the_peak_one_step_earlier(n: int, expected: float) -> None:
    assert cosine_beit(n, PEAK, WARMUP, STEPS, END) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("n", "expected"),
    [
        (0, 0.02),
        (50, 1.01),
        (100, 2.0),
        (929, 2.0),  # holds until 7 % of the steps are left
        (930, 2.0),
        (965, 2.0 * 0.01**0.5),
        (1000, 0.02),
        (5000, 0.02),
    ],
)
def test_tri_stage(n: int, expected: float) -> None:
    assert tri_stage(n, PEAK, WARMUP, STEPS, END) == pytest.approx(expected)


@pytest.mark.parametrize(("n", "expected"), [(0, 0.0), (50, 1.0), (100, 2.0), (5000, 2.0)])
def test_constant(n: int, expected: float) -> None:
    assert constant(n, PEAK, WARMUP, STEPS, END) == pytest.approx(expected)


@pytest.mark.parametrize("name", LEARNING_RATES)
@pytest.mark.parametrize(("warmup", "steps"), [(0, 10), (1, 10), (10, 10), (0, 1), (1, 1), (9, 10)])
def test_extreme_lengths(name: str, warmup: int, steps: int) -> None:
    rates = [LEARNING_RATES[name](n, PEAK, warmup, steps, END) for n in range(steps + 3)]
    assert all(math.isfinite(rate) and 0 <= rate <= PEAK for rate in rates)
    rising, falling = rates[: warmup + 1], rates[warmup:]
    assert rising == sorted(rising) and falling == sorted(falling, reverse=True)
    if steps - warmup > 1:
        assert rates[warmup] == PEAK


@pytest.mark.parametrize(
    ("n", "expected"), [(1, 0.9009), (50, 0.945), (99, 0.9891), (100, 0.99), (101, 0.99)]
)
def test_ema_decay(n: int, expected: float) -> None:
    assert ema_decay(n, 0.9, 0.99, 100) == pytest.approx(expected)


def test_ema_decay_without_annealing_is_the_end() -> None:
    assert ema_decay(1, 0.9, 0.99, 0) == 0.99
    assert ema_decay(3, 0.99, 0.99, 10) == 0.99


# ----------------------------------------------------------------------------------- configuration


@pytest.mark.parametrize("name", LEARNING_RATES)
def test_the_learning_rate_of_a_configuration(name: str) -> None:
    settings = {"lr": PEAK, "warmup_steps": WARMUP, "schedule": name, "lr_end": END}
    optim = Optim(**settings)  # type: ignore[arg-type]
    for n in (0, 50, 100, 700, 1000):
        expected = LEARNING_RATES[name](n, PEAK, WARMUP, STEPS, END)
        assert learning_rate(optim, STEPS, n) == expected


def test_every_schedule_of_the_settings_exists() -> None:
    for name in LEARNING_RATES:
        config = recipes.load("speech_tiny", [f"optim.schedule={name}"])
        assert learning_rate(config.optim, config.run.steps, config.optim.warmup_steps) == 1e-3


def test_the_teacher_decay_of_a_configuration() -> None:
    teacher = TeacherSettings(decay=0.9, decay_end=0.99, anneal_steps=100)
    assert teacher_decay(teacher, 50) == ema_decay(50, 0.9, 0.99, 100)
    assert teacher_decay(teacher, 100) == teacher_decay(teacher, 10**6) == 0.99
