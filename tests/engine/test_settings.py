"""DeepSpeed settings: invalid settings are refused, and each file in ds_configs/ trains."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from d2v_ds.config.decoding import merge
from d2v_ds.config.engine_file import load_engine_config
from d2v_ds.engine.zero import check_settings
from d2v_ds.errors import UserError
from d2v_ds.files import resource
from tests.engine.test_zero import STAGES, TOLERANCE, difference, train, zero_optimization
from tests.helpers.toy import BUCKETS, CPU, Plan, whole

RunRanks = Callable[..., list[Any]]


@pytest.mark.parametrize(
    ("settings", "precision", "message"),
    [
        ({}, "fp32", r"zero_optimization\.stage must be 0, 1, 2 or 3, got None"),
        ({"zero_optimization": {"stage": 4}}, "fp32", r"must be 0, 1, 2 or 3, got 4"),
        ({"zero_optimization": 2}, "fp32", r"must be 0, 1, 2 or 3, got None"),
        (
            {"zero_optimization": {"stage": 2, "round_robin_gradients": True}},
            "fp32",
            r"zero_optimization\.round_robin_gradients=True is refused: .*different weights",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}},
            "bf16",
            r"offload_optimizer\.device='nvme' is refused: .*fp32 masters.*use cpu",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}},
            "bf16",
            r"offload_param\.device='nvme' is refused",
        ),
        (
            {"zero_optimization": {"stage": 2}, "bf16": {"bf16_master_weights_and_grads": True}},
            "bf16",
            r"bf16\.bf16_master_weights_and_grads=True is refused: .*fp32 masters",
        ),
        (
            {"zero_optimization": {"stage": 2, "compute_grad_norm": False}},
            "fp32",
            r"compute_grad_norm=False is refused",
        ),
        (
            {"zero_optimization": {"stage": 0}},
            "fp16",
            r"engine\.precision: .*use engine\.config=zero1",
        ),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], precision: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_settings(settings, precision, CPU)


def test_the_stages_come_with_the_package() -> None:
    for stage in STAGES:
        assert check_settings(load_engine_config(f"zero{stage}"), "bf16", CPU) == stage


NODE = zero_optimization(zero_hpz_partition_size=2)  # on a node with two ranks


@pytest.mark.parametrize(
    ("name", "precision", "overrides"),
    [
        ("offload", "fp32", BUCKETS),
        ("zero3_offload", "fp32", BUCKETS),
        ("zero3_hierarchical", "fp32", merge(BUCKETS, NODE)),
        ("zero1_fp32_gradients", "bf16", BUCKETS),
    ],
)
def test_the_large_scale_files_train(
    run_ranks: RunRanks, name: str, precision: str, overrides: dict[str, Any]
) -> None:
    plan = Plan(config=name, precision=precision, steps=6, overrides=overrides)
    (local,) = run_ranks(1, train, dataclasses.replace(plan, config="local"))
    results = run_ranks(2, train, plan)
    losses = [sum(of_ranks) for of_ranks in zip(*(r["losses"] for r in results), strict=True)]
    rtol, state_rtol = TOLERANCE[precision]
    assert losses == pytest.approx(local["losses"], rel=rtol)
    assert difference(whole([r["state"] for r in results]), whole([local["state"]])) <= state_rtol


def test_settings_that_need_a_gpu_are_refused_on_a_cpu() -> None:
    with pytest.raises(UserError, match=r"zero_quantized_weights needs a GPU; .*zero3 on a CPU"):
        check_settings(load_engine_config("zero3_quantized"), "bf16", CPU)
    assert check_settings(load_engine_config("zero3_quantized"), "bf16", torch.device("cuda")) == 3


def test_the_readme_explains_every_file() -> None:
    folder = resource("ds_configs")
    rows = [r for r in (folder / "README.md").read_text().splitlines() if r.startswith("| `")]
    explained = {row.split("`")[1] for row in rows}
    assert explained == {path.stem for path in folder.glob("*.json")} and len(rows) == 9
